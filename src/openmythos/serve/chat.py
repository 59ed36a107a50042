"""Chat templates: Jinja, from a file or from tokenizer_config.json beside the model."""

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from openmythos.config import ConfigError, needs
from openmythos.files import read_json, reading
from openmythos.serve.errors import ApiError
from openmythos.serve.protocol import ChatMessage

_FILE, _SETTINGS = "chat_template.jinja", "tokenizer_config.json"


class ChatTemplate:
    """Writes messages as the text of a prompt. The template runs in Jinja's sandbox."""

    def __init__(self, source: str, special: dict[str, str], name: str) -> None:
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError as error:
            raise ConfigError(f"a chat template {needs('serve')}") from error
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals |= {"raise_exception": _raise, "strftime_now": _now}
        self.source, self._special, self._error = source, special, TemplateError
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ConfigError(f"{name}: is not a Jinja template: {error}") from error

    @classmethod
    def find(cls, folder: Path, file: str = "") -> "ChatTemplate | None":
        """The template of `file`, else the one of a model's folder, if it has one."""
        settings = folder / _SETTINGS if folder.is_dir() else folder
        data = read_json(settings) if settings.name == _SETTINGS and settings.is_file() else {}
        path = Path(file) if file else folder / _FILE
        special = {name: _text(data.get(name)) for name in ("bos_token", "eos_token")}
        if file or path.is_file():
            with reading(path):
                return cls(path.read_text(encoding="utf-8"), special, str(path))
        found = data.get("chat_template")
        return cls(found, special, str(settings)) if isinstance(found, str) else None

    def prompt(self, messages: Sequence[ChatMessage]) -> str:
        """The prompt; an ApiError if the template refuses the messages."""
        given = [{"role": message.role, "content": message.text()} for message in messages]
        try:
            return self._template.render(
                messages=given, add_generation_prompt=True, **self._special
            )
        except (self._error, TypeError, ValueError) as error:
            text = f"messages: the chat template refuses them: {error}"
            raise ApiError(400, text, param="messages", code="invalid_value") from error


def _text(token: Any) -> str:
    """A special token, which some files write as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _raise(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
