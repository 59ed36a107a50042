"""Text to token ids and back: bytes (no dependency) or byte-level BPE (extra ``bpe``).

Both are lossless. ``bos`` precedes each document: no text encodes to it, and it decodes to nothing.
A run folder keeps its tokenizer as ``tokenizer.json``.
"""

import codecs
import hashlib
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from openmythos.config import ConfigError, needs, require, require_int
from openmythos.files import reading, write_atomically

if TYPE_CHECKING:
    import tokenizers

TOKENIZER_FILE = "tokenizer.json"

# GPT-4's pre-tokenisation, changed for source code: punctuation includes the spaces after it, a
# line break the blank lines and indentation after it. This saves a tenth of the tokens.
_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*[ \t]*"
    r"|\s*[\r\n]+[ \t]*(?=\S)"
    r"|\s+(?!\S)"
    r"|\s+"
)
BOS = "<|bos|>"
# Names of the token that starts or separates documents in public tokenizers, best first.
_BOS_NAMES = (BOS, "<|begin_of_text|>", "<|begin_text|>", "<|endoftext|>", "<s>", "</s>")
# To check that a tokenizer is lossless: indentation, line ends, UTF-8 sequences of 1 to 4 bytes.
_PROBE = " The caf\u00e9's\tcost:\r\n\n    12345 \u20ac \u6f22\u5b57 \U0001f642 <s>  "


class Vocabulary(ABC):
    """Encodes text as ids and decodes ids; each id stands for a sequence of bytes."""

    bos_id: int
    token_bytes: Sequence[bytes]  # UTF-8 of each id; empty for bos and other special tokens

    @property
    def vocab_size(self) -> int:
        return len(self.token_bytes)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of the text, without bos."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a text to continue; at least one."""
        return [self.bos_id, *self.encode(text)]

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids after which a text ends."""
        return (self.bos_id,)

    def decode(self, ids: Iterable[int]) -> str:
        """The text; invalid UTF-8 becomes U+FFFD."""
        joined = b"".join(_bytes_of(self.token_bytes, token) for token in ids)
        return joined.decode("utf-8", errors="replace")


class Tokenizer(Vocabulary):
    """A vocabulary that can be saved as tokenizer.json."""

    @abstractmethod
    def serialized(self) -> str:
        """The content of tokenizer.json."""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write tokenizer.json."""
        write_atomically(Path(folder) / TOKENIZER_FILE, self.serialized())


class ByteTokenizer(Tokenizer):
    """UTF-8 bytes as ids 0 to 255, and bos."""

    bos_id = 256

    def __init__(self) -> None:
        self.token_bytes = (*(bytes([value]) for value in range(256)), b"")

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def serialized(self) -> str:
        return json.dumps({"kind": "bytes"}) + "\n"


class BPETokenizer(Tokenizer):
    """Byte-level BPE by the ``tokenizers`` library; see ``train`` and ``load_tokenizer``."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer", name: str = "tokenizer") -> None:
        named = {bos: tokenizer.token_to_id(bos) for bos in _BOS_NAMES}
        found = [(bos, token) for bos, token in named.items() if token is not None]
        if not found:
            raise ConfigError(f"{name}: has no token named any of {', '.join(_BOS_NAMES)}")
        bos, self.bos_id = found[0]
        # The text "<|bos|>" in a document must not become a document boundary. A file may also
        # switch on padding and truncation.
        tokenizer.add_special_tokens([bos])
        tokenizer.encode_special_tokens = True
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        self.token_bytes = _token_bytes(tokenizer, name)
        if self.decode(self.encode(_PROBE)) != _PROBE:
            raise ConfigError(f"{name}: is not lossless, only byte-level BPE is supported")

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> "BPETokenizer":
        """Learn merges until there are vocab_size ids, or nothing is left to merge."""
        library = _import_tokenizers()
        byte_level = library.pre_tokenizers.ByteLevel
        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence(
            [
                library.pre_tokenizers.Split(library.Regex(_SPLIT), "isolated"),
                byte_level(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS],
            initial_alphabet=byte_level.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def serialized(self) -> str:
        return self._tokenizer.to_str()


class StreamDecoder:
    """Decodes ids one at a time; joined, the texts equal ``decode`` of all ids.

    A character that is split over several ids is returned with the last of them.
    """

    def __init__(self, tokenizer: Vocabulary) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(_bytes_of(self._token_bytes, token))

    def finish(self) -> str:
        """U+FFFD if the last character is incomplete, else ""; resets the decoder."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Read a tokenizer.json (ours or Hugging Face's), given by its path or its folder."""
    file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
    with reading(file):
        data = file.read_bytes()
    try:
        text = data.decode()
        if json.loads(text) == {"kind": "bytes"}:
            return ByteTokenizer()
        return BPETokenizer(_import_tokenizers().Tokenizer.from_str(text), str(file))
    except ConfigError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ConfigError(f"{file}: is not a tokenizer file: {error}") from error


def fingerprint(tokenizer: Tokenizer) -> str:
    """sha256 of the serialized tokenizer: equal fingerprints mean equal ids."""
    return hashlib.sha256(tokenizer.serialized().encode()).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """One id per UTF-8 byte, and bos: 257 ids, nothing to train."""

    kind: Literal["bytes"] = "bytes"

    def build(self, texts: Iterable[str]) -> Tokenizer:
        return ByteTokenizer()


@dataclass(frozen=True, kw_only=True)
class BPE:
    """Byte-level BPE trained on the corpus."""

    kind: Literal["bpe"] = "bpe"
    vocab_size: int = 4096

    def __post_init__(self) -> None:
        require_int("vocab_size", self.vocab_size, minimum=257, maximum=2**31 - 1)

    def build(self, texts: Iterable[str]) -> Tokenizer:
        return BPETokenizer.train(texts, self.vocab_size)


@dataclass(frozen=True, kw_only=True)
class TokenizerFile:
    """A tokenizer.json of Hugging Face or of a run folder."""

    kind: Literal["file"] = "file"
    path: str = ""

    def build(self, texts: Iterable[str]) -> Tokenizer:
        require(self.path != "", "path", self.path, "must name a tokenizer.json or its folder")
        return load_tokenizer(self.path)


TokenizerChoice = Bytes | BPE | TokenizerFile


def _bytes_of(table: Sequence[bytes], token: int) -> bytes:
    # A negative id would index from the end.
    if not 0 <= token < len(table):
        raise ValueError(f"token id {token}: the tokenizer has ids 0 to {len(table) - 1}")
    return table[token]


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(f"a BPE tokenizer {needs('bpe')}") from error
    return tokenizers


def byte_alphabet() -> dict[str, int]:
    """From each character of GPT-2's byte-level alphabet to the byte that it stands for."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden: Iterator[int] = (value for value in range(256) if value not in set(visible))
    shifted = {chr(256 + number): value for number, value in enumerate(hidden)}
    return {chr(value): value for value in visible} | shifted


def _token_bytes(tokenizer: "tokenizers.Tokenizer", name: str) -> tuple[bytes, ...]:
    alphabet = byte_alphabet()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    added = tokenizer.get_added_tokens_decoder()
    # Ids need not be contiguous; unused ids keep the empty string.
    table = [b""] * (max(vocabulary.values()) + 1)
    for text, token in vocabulary.items():
        if token in added:
            table[token] = b"" if added[token].special else text.encode()
            continue
        try:
            table[token] = bytes(alphabet[character] for character in text)
        except KeyError as error:
            raise ConfigError(f"{name}: token {text!r} is not byte-level BPE's") from error
    return tuple(table)
