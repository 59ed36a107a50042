"""Tokenizers of public checkpoints, and the commands on their folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM

import openmythos
from openmythos import ConfigError, Sampling
from openmythos.cli import main
from openmythos.data.tokenizer import byte_alphabet
from openmythos.hub.info import describe
from openmythos.hub.load import open_source
from openmythos.hub.tokenizer import load_public_tokenizer
from openmythos.inference.generation import Request
from openmythos.inference.text import Engine

SPECIAL = ["<|endoftext|>", "<|im_end|>"]
VOCAB = 264  # padded: the tokenizer has 258 ids


def byte_level() -> Tokenizer:
    """All bytes and two special tokens."""
    names = [*sorted(byte_alphabet()), *SPECIAL]
    made = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


def with_fallback() -> Tokenizer:
    """As Llama 2 and TinyLlama: pieces of text, and bytes for all that has no piece."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "\u2581",
        "a",
        "\u2581a",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    model = models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True)
    made = Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(Regex(" "), "\u2581")]
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama as it lies on the Hub, with a card and a tokenizer."""
    folder = tmp_path_factory.mktemp("llama") / "SmolThing"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        bos_token_id=256,
        eos_token_id=[256, 257],
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    byte_level().save(str(folder / "tokenizer.json"))
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\n# SmolThing\n")
    (folder / "LICENSE").write_text("Apache License\n")
    return folder


def run(*argv: object) -> None:
    assert main([str(word) for word in argv]) == 0


def test_import_keeps_tokenizer_and_licence(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    run("import", folder, "--out", out)
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "LICENSE"} <= names
    source, theirs = open_source(out), open_source(folder)
    assert source.format.name == "openmythos" and source.config == theirs.config
    assert source.tokenizer.stop_ids == theirs.tokenizer.stop_ids == (256, 257)
    request = Request(max_new_tokens=8, num_loops=1, sampling=Sampling(temperature=0))
    found = [Engine(x.load(), x.tokenizer).generate("a b", request) for x in (source, theirs)]
    assert found[0] == found[1] != ""
    assert main(["import", str(folder), "--out", str(out)]) == 2  # exists already
    assert main(["import", str(folder), "--out", str(tmp_path / "x"), "--dtype", "int8"]) == 2


def test_generate_and_plan(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--prompt", "a<|im_end|>b", "--max-new-tokens", 5, "--device", "cpu"]
    run("generate", folder, *given, "--temperature", 0)
    assert capsys.readouterr().out.startswith("a<|im_end|>b")
    monkeypatch.chdir(folder.parent)  # a narrow terminal shortens a long path
    run("plan", folder.name, "--context", 32)
    assert folder.name in capsys.readouterr().out
    assert main(["plan", "no-such-preset"]) == 2


def test_eval_scores_text(folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some text to score, long enough for two windows of sixty-four tokens " * 4)
    run("eval", folder, "--data", text, "--out", tmp_path / "report", "--device", "cpu")
    found = json.loads((tmp_path / "report" / "eval.json").read_text())
    row = found["other_text"][0]
    assert row["num_loops"] == 1 and row["num_bytes"] == len(text.read_bytes())
    assert row["bits_per_byte"] == pytest.approx(8, abs=1)  # an untrained model of bytes
    assert main(["eval", str(folder)]) == 2  # it has no held-out text of its own


def test_info(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("info", folder)
    shown = capsys.readouterr().out
    assert "apache-2.0" in shown and "yes: names and shapes fit" in shown
    rows = describe(open_source(folder))
    assert rows["layers"].startswith("0 / 2 / 0") and rows["tokenizer"] == f"{VOCAB} ids"
    model = openmythos.load(folder)
    assert rows["parameters"] == f"{sum(p.numel() for p in model.parameters()):,}"
    cache = model.new_cache(1, 10, dtype=torch.bfloat16)
    assert rows["cache"].startswith(f"{cache.nbytes // 10:,} B per token")
    assert "attention = grouped_query" in rows["not our default"]
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((folder / "config.json").read_text())
    save_file({"x": torch.zeros(1)}, broken / "model.safetensors")
    rows = describe(open_source(broken))
    assert rows["loads"].startswith("no: ") and "is missing" in rows["loads"]
    assert rows["licence"] == "not stated" and "has no tokenizer.json" in rows["tokenizer"]


def test_byte_level_tokenizer(folder: Path) -> None:
    tokenizer = open_source(folder).tokenizer
    text = " The caf\u00e9\r\n\u20ac <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert 257 in tokenizer.prompt_ids(text) and 257 not in tokenizer.encode(text)
    assert tokenizer.encode_batch([text]) == [tokenizer.encode(text)]
    assert tokenizer.prompt_ids("") == [256] and tokenizer.vocab_size == VOCAB


@pytest.mark.parametrize("adds", [True, False, None])
def test_tokenizer_with_byte_fallback(adds: bool | None, tmp_path: Path) -> None:
    with_fallback().save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "add_bos_token": adds}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = load_public_tokenizer(tmp_path, 300)
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (1, (2,))
    ids = tokenizer.prompt_ids("a a\u00e9")
    assert (ids[0] == 1) is (adds is not False)  # tokenizer.json adds it, unless told otherwise
    assert tokenizer.decode(ids) == " a a\u00e9"


def test_tokenizers_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no tokenizer\.json"):
        load_public_tokenizer(tmp_path, 300)
    (tmp_path / "config.json").write_text('{"bos_token_id": 0}')
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer file"):
        load_public_tokenizer(tmp_path, 300)
    made = byte_level()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="which token ends a text"):
        load_public_tokenizer(tmp_path, 300)
    (tmp_path / "config.json").write_text('{"eos_token_id": 0}')
    made.decoder = decoders.WordPiece()
    made.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ConfigError, match="neither byte-level BPE nor"):
        load_public_tokenizer(tmp_path, 300)
