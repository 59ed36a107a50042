"""Options of the command, keys and chat templates."""

import json
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from openmythos.cli.serve import Serve
from openmythos.config import ConfigError, apply_overrides
from openmythos.serve.chat import ChatTemplate
from openmythos.serve.errors import ApiError
from openmythos.serve.limits import ServerLimits
from openmythos.serve.protocol import ChatMessage
from openmythos.serve.replicas import Body, Replicas
from openmythos.serve.run import KEY_VARIABLE, ServerOptions, Settings, read_keys
from openmythos.serve.service import Service
from openmythos.serve.source import Served

HELLO = (ChatMessage(role="user", content="hi"),)


def test_keys_come_from_a_file_or_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# comment\n\n one \ntwo\n")
    assert read_keys(str(file)) == ("one", "two")
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_keys("") == ()
    monkeypatch.setenv(KEY_VARIABLE, "three")
    assert read_keys("") == ("three",)
    file.write_text("# nothing\n")
    with pytest.raises(ConfigError, match="holds no key"):
        read_keys(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(str(tmp_path / "missing"))


def test_settings_are_named_in_errors() -> None:
    changed = apply_overrides(Settings(), ["limits.max_loops=128", "engine.max_rows=4"])
    assert (changed.limits.max_loops, changed.engine.max_rows) == (128, 4)
    for override, text in (
        ("limits.max_loop=1", "did you mean 'max_loops'"),
        ("limits.max_loops=0", "limits.max_loops = 0"),
        ("engine.max_rows=x", "engine.max_rows = 'x'"),
    ):
        with pytest.raises(ConfigError, match=text):
            apply_overrides(Settings(), [override])
    with pytest.raises(ConfigError, match="port = 70000"):
        ServerOptions(port=70000)
    with pytest.raises(ConfigError, match="replicas = -1"):
        ServerOptions(replicas=-1)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openmythos.serve.run", None)
    with pytest.raises(ConfigError, match=r"serve needs: pip install 'openmythos\[serve\]'"):
        Serve().run()


def test_a_template_is_found_beside_the_model(tmp_path: Path) -> None:
    assert ChatTemplate.find(tmp_path) is None
    settings = {"chat_template": "{{ bos_token }}{{ messages[0].content }}"}
    settings["bos_token"] = {"content": "<s>"}  # type: ignore[assignment]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = ChatTemplate.find(tmp_path)
    assert found is not None and found.prompt(HELLO) == "<s>hi"
    (tmp_path / "chat_template.jinja").write_text("file {{ messages[0].role }}")
    found = ChatTemplate.find(tmp_path)
    assert found is not None and found.prompt(HELLO) == "file user"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[5].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_error(tmp_path: Path, source: str) -> None:
    (tmp_path / "t").write_text(source)
    template = ChatTemplate.find(tmp_path, str(tmp_path / "t"))
    assert template is not None
    with pytest.raises(ApiError, match="the chat template refuses") as error:
        template.prompt(HELLO)
    assert (error.value.status, error.value.param) == (400, "messages")


def test_a_file_that_is_no_template_is_named(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("{% if %}")
    with pytest.raises(ConfigError, match="is not a Jinja template"):
        ChatTemplate.find(tmp_path, str(tmp_path / "t"))


def _never(_pipe: Connection) -> Body:
    raise AssertionError("no replica is started")


def test_a_model_of_a_task_takes_no_chat_template() -> None:
    served, limits = Served.open(""), ServerLimits()
    with pytest.raises(ConfigError, match="chat_template = 't': is for a language model"):
        Service.open(served, Replicas(0, _never, limits), limits, chat_template="t")
