"""Strict reading of a public checkpoint's config.json.

Every key is read, checked, or known not to change the logits. Any other key that is switched on is
an error: it may be an option that this package does not implement.
"""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from openmythos.config import ConfigError

# Keys that do not change the logits of a forward pass, in any format.
_UNRELATED = (
    *("model_type", "architectures", "auto_map", "_name_or_path", "_class_name", "name", "license"),
    *("transformers_version", "torch_dtype", "dtype", "use_cache", "cache_implementation"),
    *("initializer_range", "*dropout*", "*_token_id", "_attn_implementation*", "attn_impl*"),
    *("id2label", "label2id", "return_dict", "problem_type", "task_specific_params"),
    *("hf_config", "is_llama_config", "transformers.js_config", "chunk_size_feed_forward"),
    *("keys_to_ignore_at_inference", "is_decoder", "max_length", "temperature", "top_k", "top_p"),
    *("rope_interleaved", "unsloth_version", "_experts_implementation*"),
)
_MISSING: Any = object()


class Fields:
    """The keys of a config.json; `finish` refuses those that were not read and are switched on."""

    def __init__(self, path: Path, data: Mapping[str, Any]) -> None:
        self.path = path
        self.data = data
        self._known: set[str] = set()
        self._inner: list[Fields] = []

    def __contains__(self, key: str) -> bool:
        return self.data.get(key) is not None

    def error(self, key: str, text: str) -> ConfigError:
        """The error for a key and its value."""
        return ConfigError(f"{self.path}: {key} = {self.data.get(key)!r:.200}: {text}")

    def get(self, key: str, default: Any = _MISSING) -> Any:
        """The value of any type; null counts as missing."""
        self._known.add(key)
        value = self.data.get(key)
        if value is None:
            if default is _MISSING:
                raise ConfigError(f"{self.path}: {key}: missing, must be given")
            return default
        return value

    def integer(self, key: str, default: int = _MISSING) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "must be an integer")
        return value

    def number(self, key: str, default: float = _MISSING) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "must be a number")
        return float(value)

    def flag(self, key: str, default: bool = _MISSING) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        """A nested table; empty if it is missing."""
        value = self.get(key, {})
        if not isinstance(value, Mapping):
            raise self.error(key, "must be a table")
        return value

    def inner(self, key: str) -> "Fields":
        """The fields of a nested table, which are as strict."""
        self._inner.append(Fields(self.path, self.table(key)))
        return self._inner[-1]

    def fixed(self, key: str, *allowed: Any) -> None:
        """The key may be missing, or have one of these values: others are not implemented."""
        value = self.get(key, allowed[0])
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            shown = " or ".join(map(repr, allowed))
            raise self.error(key, f"is not implemented, only {shown}")

    def off(self, *keys: str) -> None:
        """The keys may be missing or switched off: other values are not implemented."""
        for key in keys:
            if _is_on(self.get(key, None)):
                raise self.error(key, "is not implemented, must be switched off")

    def unrelated(self, *patterns: str) -> None:
        """Keys of this format that do not change the logits."""
        self._known |= {key for key in self.data if _matches(key, patterns)}

    def finish(self, ignore: Sequence[str] = ()) -> None:
        """Refuse the keys that were not read and are switched on, but not those to `ignore`."""
        known = (*_UNRELATED, *ignore)
        for fields in self._inner:
            fields.finish(ignore)
        for key, value in self.data.items():
            if key not in self._known and _is_on(value) and not _matches(key, known):
                raise self.error(
                    key,
                    "is not known, so it may change the logits; if it does not, ignore it "
                    f"(load: ignore=[{key!r}]; openmythos import --ignore {key})",
                )


def _is_on(value: Any) -> bool:
    return value not in (None, False, 0, "", "none", "None", "default") and value not in ([], {})


def _matches(key: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)
