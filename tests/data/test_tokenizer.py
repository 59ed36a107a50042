"""Both tokenizers are lossless, also when streaming; a saved tokenizer loads unchanged."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from openmythos.config import ConfigError, from_dict, to_dict
from openmythos.data.corpus import Corpus
from openmythos.data.tokenizer import (
    BPE,
    BPETokenizer,
    Bytes,
    ByteTokenizer,
    StreamDecoder,
    Tokenizer,
    TokenizerChoice,
    TokenizerFile,
    fingerprint,
    load_tokenizer,
)

SOURCE = (
    "def loop(state):\n    for i in range(16):\n        state = decay * state\n\n    return 1\n"
)
TOKENIZERS: dict[str, Tokenizer] = {
    "bytes": ByteTokenizer(),
    "bpe": BPETokenizer.train([SOURCE, "naïve café, 漢字 🙂\n"] * 4, 300),
}
EACH = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())
TEXTS = st.text() | st.text(alphabet=" \t\r\n_aä漢🙂1.")


def write_tokenizer(folder: Path, tokenizer: tokenizers.Tokenizer) -> Path:
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def byte_level(specials: Sequence[str]) -> tokenizers.Tokenizer:
    split = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = split
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=list(specials),
        initial_alphabet=split.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([SOURCE], trainer)
    return made


@EACH
@given(text=TEXTS)
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes[token] for token in ids) == text.encode()
    assert all(0 <= token < tokenizer.vocab_size for token in ids)
    assert tokenizer.bos_id not in ids


@EACH
@given(texts=st.lists(TEXTS, max_size=4))
def test_a_batch_is_its_texts(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


@EACH
@given(data=st.data())
def test_stream_equals_decode_for_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=40))
    decoder = StreamDecoder(tokenizer)
    parts = [decoder.push(token) for token in ids]
    assert "".join(parts) + decoder.finish() == tokenizer.decode(ids)
    assert decoder.finish() == ""


@EACH
@given(text=TEXTS)
def test_stream_never_shows_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    decoder = StreamDecoder(tokenizer)
    shown = ""
    for token in tokenizer.encode(text):
        shown += decoder.push(token)
        assert text.startswith(shown)
    assert shown == text


@EACH
@pytest.mark.parametrize("special", ["<|bos|>", "<s>", "<|endoftext|>"])
def test_text_cannot_forge_a_boundary(tokenizer: Tokenizer, special: str) -> None:
    ids = tokenizer.encode(f"a{special}b")
    assert tokenizer.bos_id not in ids
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.bos_id]) == f"a{special}b"


@EACH
@pytest.mark.parametrize("token", [-1, 10**6])
def test_unknown_ids_are_named(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(ValueError, match=f"token id {token}"):
        tokenizer.decode([token])


@EACH
def test_saved_and_loaded_is_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert fingerprint(loaded) == fingerprint(tokenizer)
        assert loaded.bos_id == tokenizer.bos_id
        assert loaded.encode(SOURCE) == tokenizer.encode(SOURCE)
        assert loaded.decode(loaded.encode("a<|bos|>")) == "a<|bos|>"


def test_fingerprint_tells_tokenizers_apart() -> None:
    assert fingerprint(ByteTokenizer()) == fingerprint(TOKENIZERS["bytes"])
    other = BPETokenizer.train([SOURCE], 280)
    assert len({fingerprint(each) for each in (*TOKENIZERS.values(), other)}) == 3


def test_training_is_deterministic() -> None:
    first, second = (BPETokenizer.train([SOURCE], 300) for _ in range(2))
    assert fingerprint(first) == fingerprint(second)


def test_indentation_is_one_token() -> None:
    bpe = BPETokenizer.train([SOURCE] * 4, 400)
    pieces = [bpe.token_bytes[token] for token in bpe.encode(SOURCE)]
    assert b"):\n    " in pieces
    assert b"):\n        " in pieces


@pytest.mark.slow
def test_compression_of_unseen_source() -> None:
    corpus = Corpus(["stdlib"])
    bpe = BPETokenizer.train((document.text for document in corpus.train()), 4096)
    text = "".join(document.text for document in corpus.held_out())
    assert len(text.encode()) / len(bpe.encode(text)) >= 3.5


@pytest.mark.parametrize("bos", ["<|begin_of_text|>", "<|endoftext|>", "<s>", "</s>"])
def test_bos_of_public_tokenizers(tmp_path: Path, bos: str) -> None:
    path = write_tokenizer(tmp_path, byte_level(["<|pad|>", bos]))
    loaded = load_tokenizer(path)
    assert loaded.bos_id == 1
    assert loaded.token_bytes[0] == loaded.token_bytes[1] == b""
    assert loaded.decode(loaded.encode(f"{SOURCE}{bos}")) == f"{SOURCE}{bos}"


def test_begin_goes_before_end(tmp_path: Path) -> None:
    loaded = load_tokenizer(write_tokenizer(tmp_path, byte_level(["</s>", "<s>"])))
    assert loaded.bos_id == 1


def test_padding_and_truncation_of_a_file_are_off(tmp_path: Path) -> None:
    made = byte_level(["<s>"])
    made.enable_padding(length=64)
    made.enable_truncation(8)
    loaded = load_tokenizer(write_tokenizer(tmp_path, made))
    assert loaded.decode(loaded.encode(SOURCE)) == SOURCE
    assert len(loaded.encode("a")) == 1


def test_a_file_without_bos_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer(tmp_path, byte_level([]))
    with pytest.raises(ConfigError, match=r"tokenizer\.json: has no token named any of"):
        load_tokenizer(path)


def test_a_lossy_file_is_refused(tmp_path: Path) -> None:
    made = byte_level(["<s>"])
    made.normalizer = tokenizers.normalizers.Lowercase()
    with pytest.raises(ConfigError, match="is not lossless"):
        load_tokenizer(write_tokenizer(tmp_path, made))


def test_a_file_of_another_scheme_is_refused(tmp_path: Path) -> None:
    vocabulary = {"<s>": 0, "\u2581the": 1}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    with pytest.raises(ConfigError, match="is not byte-level BPE's"):
        load_tokenizer(write_tokenizer(tmp_path, made))


@pytest.mark.parametrize("content", [b"{}", b"[1]", b"no json", b"\xff", b'{"kind": "byte"}'])
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer\.json: is not"):
        load_tokenizer(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.json: cannot be read"):
        load_tokenizer(tmp_path / "nowhere.json")


def test_the_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert Bytes().build([]).vocab_size == 257
    with pytest.raises(ConfigError, match=r"pip install 'openmythos\[bpe\]'"):
        BPE().build([SOURCE])


@pytest.mark.parametrize("choice", get_args(TokenizerChoice))
def test_choices_are_configs(choice: type) -> None:
    config = choice()
    assert from_dict(TokenizerChoice, to_dict(config)) == config


def test_choices_build(tmp_path: Path) -> None:
    assert Bytes().build([SOURCE]).encode("é") == [0xC3, 0xA9]
    trained = BPE(vocab_size=270).build(iter([SOURCE]))
    assert trained.vocab_size == 270
    trained.save(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text())["version"] == "1.0"
    assert fingerprint(TokenizerFile(path=str(tmp_path)).build([])) == fingerprint(trained)


def test_wrong_choices_are_named() -> None:
    with pytest.raises(ConfigError, match="vocab_size = 256: must be an integer, at least 257"):
        BPE(vocab_size=256)
    with pytest.raises(ConfigError, match=r"path = '': must name a tokenizer\.json"):
        TokenizerFile().build([])
