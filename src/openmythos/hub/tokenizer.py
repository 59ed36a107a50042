"""Tokenizers of public checkpoints: tokenizer.json, byte-level BPE or BPE with byte fallback."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openmythos.config import ConfigError, needs
from openmythos.data.tokenizer import (
    TOKENIZER_FILE,
    Tokenizer,
    byte_alphabet,
    load_tokenizer,
)
from openmythos.files import read_json, reading

if TYPE_CHECKING:
    import tokenizers

_SETTINGS = ("tokenizer_config.json", "generation_config.json", "config.json")
# What an imported model keeps of the checkpoint besides config and weights.
COPIED = (TOKENIZER_FILE, "tokenizer_config.json", "generation_config.json", "LICENSE*", "NOTICE*")
_KEYS = ("bos_token_id", "eos_token_id", "bos_token", "eos_token", "add_bos_token")
_SPACE = "\u2581"  # how SentencePiece writes a space


class PublicTokenizer(Tokenizer):
    """A tokenizer.json of the ``tokenizers`` library, with the ids of start and end.

    `encode` reads special tokens in a text as text, `prompt_ids` as tokens, as chat formats need.
    """

    def __init__(
        self,
        tokenizer: "tokenizers.Tokenizer",
        *,
        vocab_size: int,
        bos_id: int,
        stop_ids: Sequence[int],
        adds_bos: bool | None = None,
        name: str = "tokenizer",
    ) -> None:
        """`adds_bos` None: prompts start with bos if tokenizer.json says so."""
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._prompts = tokenizer
        self._texts = type(tokenizer).from_str(tokenizer.to_str())
        self._texts.encode_special_tokens = True
        self.bos_id, self._stop_ids, self._adds_bos = bos_id, tuple(stop_ids), adds_bos
        table = _token_bytes(tokenizer, name)
        # Embeddings are often padded to a round number; ids beyond the vocabulary are no text.
        self.token_bytes = (*table, *[b""] * (vocab_size - len(table)))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        return self._stop_ids

    def encode(self, text: str) -> list[int]:
        return self._texts.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._texts.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in found]

    def prompt_ids(self, text: str) -> list[int]:
        ids: list[int] = self._prompts.encode(text, add_special_tokens=True).ids
        starts = ids[:1] == [self.bos_id]
        if self._adds_bos is True and not starts:
            ids = [self.bos_id, *ids]
        elif self._adds_bos is False and starts and not text.startswith(self._bos_text()):
            ids = ids[1:]
        return ids or [self.bos_id]

    def _bos_text(self) -> str:
        return str(self._prompts.id_to_token(self.bos_id))

    def serialized(self) -> str:
        return self._prompts.to_str()

    def files(self) -> dict[str, dict[str, Any]]:
        """The files that say the same as this object, by their names."""
        bos, eos = (self._prompts.id_to_token(i) for i in (self.bos_id, self._stop_ids[0]))
        kind = "PreTrainedTokenizerFast"
        settings: dict[str, Any] = {"tokenizer_class": kind, "bos_token": bos, "eos_token": eos}
        if self._adds_bos is not None:
            settings |= {"add_bos_token": self._adds_bos}
        ids = {"bos_token_id": self.bos_id, "eos_token_id": list(self._stop_ids)}
        return {
            TOKENIZER_FILE: json.loads(self.serialized()),
            "tokenizer_config.json": settings,
            "generation_config.json": ids,
        }


def load_public_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, or of its subfolder tokenizer/."""
    files = [folder / TOKENIZER_FILE, folder / "tokenizer" / TOKENIZER_FILE]
    file = next((path for path in files if path.is_file()), None)
    if file is None:
        raise ConfigError(f"{folder}: has no {TOKENIZER_FILE}")
    settings = _settings({file.parent, folder})
    if not settings:
        return load_tokenizer(file)  # of this package, which has one id for start and end
    library = _library(file)
    with reading(file):
        text = file.read_bytes().decode()
    try:
        tokenizer = library.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{file}: is not a tokenizer file: {error}") from error
    bos, eos = (_special_ids(settings, kind, tokenizer) for kind in ("bos", "eos"))
    if not eos:
        raise ConfigError(f"{file}: no file beside it says which token ends a text")
    return PublicTokenizer(
        tokenizer,
        vocab_size=vocab_size,
        bos_id=(bos or eos)[0],
        stop_ids=eos,
        adds_bos=settings.get("add_bos_token"),
        name=str(file),
    )


def _library(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(f"{path}: {needs('bpe')}") from error
    return tokenizers


def _settings(folders: Iterable[Path]) -> dict[str, Any]:
    """Which tokens start and end a text, of the first file that says it."""
    found: dict[str, Any] = {}
    for path in (folder / name for name in _SETTINGS for folder in folders):
        if path.is_file():
            given = read_json(path)
            found = {k: given[k] for k in _KEYS if given.get(k) is not None} | found
    return found


def _special_ids(settings: dict[str, Any], kind: str, tokenizer: Any) -> list[int]:
    """The ids of bos or eos, which are given as ids or as texts."""
    ids = settings.get(f"{kind}_token_id", [])
    ids = ids if isinstance(ids, list) else [ids]
    text = settings.get(f"{kind}_token")
    named = tokenizer.token_to_id(text.get("content") if isinstance(text, dict) else str(text))
    return [*ids, *([] if named is None or named in ids else [named])]


# How a text is cut before its pieces are encoded, by the name that llama.cpp gives it.
_NUMBER, _WORD = r"\p{N}", r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS = {
    "llama-bpe": rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}|{_NUMBER}{{1,3}}{_REST}",
    "qwen2": rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{_WORD}|{_NUMBER}{_REST}",
}


def byte_level_bpe(
    tokens: Sequence[str], merges: Sequence[str], added: Mapping[str, bool], cut: str, name: str
) -> Any:
    """A byte-level BPE of the ``tokenizers`` library from its parts, as a GGUF file has them.

    `added`: tokens outside the merges, and whether a decoded text leaves them out.
    """
    library = _library(Path(name))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    model = library.models.BPE({token: i for i, token in enumerate(tokens)}, pairs)
    tokenizer = library.Tokenizer(model)
    split = library.pre_tokenizers
    if cut in _CUTS:
        steps = [split.Split(library.Regex(_CUTS[cut]), "isolated")]
        steps.append(split.ByteLevel(add_prefix_space=False, use_regex=False))
    elif cut in ("smollm", "default", "gpt-2"):
        steps = [split.Digits(individual_digits=True)] if cut == "smollm" else []
        steps.append(split.ByteLevel(add_prefix_space=False))
    else:
        known = ", ".join((*_CUTS, "smollm", "default", "gpt-2"))
        raise ConfigError(f"{name}: tokenizer.ggml.pre = {cut!r}: must be one of {known}")
    tokenizer.pre_tokenizer = split.Sequence(steps)
    tokenizer.decoder = library.decoders.ByteLevel()
    tokenizer.add_tokens([text for text, special in added.items() if not special])
    tokenizer.add_special_tokens([text for text, special in added.items() if special])
    return tokenizer


def _token_bytes(tokenizer: "tokenizers.Tokenizer", name: str) -> list[bytes]:
    """The UTF-8 bytes of every id; empty for special tokens and unused ids."""
    decoder = json.dumps(json.loads(tokenizer.to_str()).get("decoder"), ensure_ascii=False)
    byte_level = '"ByteLevel"' in decoder
    if (
        not byte_level
        and _SPACE not in json.loads(decoder if decoder != "null" else '""').__repr__()
    ):
        raise ConfigError(f"{name}: is neither byte-level BPE nor BPE with byte fallback")
    alphabet = byte_alphabet()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    table = [b""] * (max(vocabulary.values()) + 1)
    for text, token in vocabulary.items():
        if token in added:
            table[token] = b"" if added[token].special else text.encode()
        elif byte_level:
            table[token] = _of_bytes(text, alphabet)
        else:
            table[token] = _of_piece(text)
    return table


def _of_bytes(text: str, alphabet: dict[str, int]) -> bytes:
    # A few vocabularies hold plain text outside the alphabet of bytes.
    if all(character in alphabet for character in text):
        return bytes(alphabet[character] for character in text)
    return text.encode()


def _of_piece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace(_SPACE, " ").encode()
