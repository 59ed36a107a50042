"""`openmythos export`: every public format, and exports for transformers of public checkpoints."""

import json
from pathlib import Path

import gguf
import pytest
import torch
from hub.test_commands import byte_level
from hub.test_formats import THEIRS, transformers_model, write
from hub.test_gguf import transformers_model as gguf_model
from hub.test_gguf import write as write_gguf
from references import CASES, TOKENS
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import openmythos
import openmythos.hub.export_auto
from openmythos import OpenMythos, presets
from openmythos.cli import main
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.hub import convert
from openmythos.hub.load import open_source

# A checkpoint for each form: one of its own family, or one that it can hold all the same.
SOURCES = {name: name for name in (*CASES, *THEIRS)} | {"retrofit": "retrofit_olmo"}
SOURCES |= {"native": "xllm_moe_middle", "hf": "ouro"}


def checkpoint(folder: Path, name: str) -> Path:
    """A small public checkpoint with a tokenizer and a licence."""
    if name in CASES:
        write(folder, CASES[name].config, CASES[name].weights)
    else:
        transformers_model(name).save_pretrained(folder)
    (folder / "LICENSE").write_text("Apache License\n")
    return folder


def export(source: Path, out: Path, *options: str) -> int:
    return main(["export", str(source), "--out", str(out), *options])


def refusal(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *options: str) -> str:
    """The one line of an export that must be refused, and leave nothing."""
    before = set(out.parent.iterdir())
    assert export(source, out, *options) == 2
    assert set(out.parent.iterdir()) == before
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def assert_equal(found: OpenMythos, expected: dict[str, Tensor]) -> None:
    state = found.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(state[name], tensor, rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("form", convert.forms())
def test_what_is_exported_is_what_is_loaded(form: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "theirs", SOURCES[form])
    model = openmythos.load(folder)
    assert export(folder, tmp_path / "out", "--format", form) == 0
    again = openmythos.load(tmp_path / "out")
    assert again.config == model.config
    assert_equal(again, model.state_dict())
    known = {"native": "openmythos", "hf": "openmythos-hf"}
    assert open_source(tmp_path / "out").format.name == known.get(form, form)
    assert (tmp_path / "out" / "LICENSE").read_text() == "Apache License\n"


def test_one_checkpoint_becomes_another_family(tmp_path: Path) -> None:
    """A Llama is a Nanbeige of one loop, where the last norm is the head's."""
    folder = checkpoint(tmp_path / "llama", "llama")
    assert export(folder, tmp_path / "out", "--format", "nanbeige") == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_loops"] == 1
    assert_equal(openmythos.load(tmp_path / "out"), openmythos.load(folder).state_dict())


def test_models_that_a_format_cannot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ouro, out = checkpoint(tmp_path / "ouro", "ouro"), tmp_path / "out"
    line = refusal(capsys, ouro, out, "--format", "llama")
    assert "format llama: cannot represent num_loops = 3" in line
    line = refusal(capsys, ouro, out, "--format", "gguf")
    assert "format = 'gguf'" in line and "native, hf, huginn, ouro" in line
    line = refusal(capsys, ouro, out, "--format", "lm-eval")
    assert f"{ouro} is not a run" in line
    assert "is not a run" in refusal(capsys, ouro, out, "--step", "3")
    model = openmythos.load(checkpoint(tmp_path / "huginn", "huginn"))
    with torch.no_grad():
        model.norm.weight.add_(1)
    model.save_pretrained(tmp_path / "own")
    line = refusal(capsys, tmp_path / "own", out, "--format", "huginn")
    assert "format huginn: tensor norm.weight + recurrent.readout_norm.weight: " in line
    assert "differ, the format has one tensor for them" in line


@torch.no_grad()
@pytest.mark.parametrize("name", ["ouro", "huginn", "xllm_raw_injection", "gemma"])
def test_transformers_reads_a_converted_checkpoint(name: str, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "theirs", name)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert export(folder, tmp_path / "hub", "--format", "hf") == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub").eval()
    expected = openmythos.load(folder)(TOKENS).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, atol=2e-5, rtol=1e-5)
    card = (tmp_path / "hub" / "README.md").read_text()
    assert 'license: "mit"' in card and "not trained further" in card


@pytest.mark.parametrize("form", ["native", "hf", "llama"])
def test_tokenizers_are_kept(form: str, tmp_path: Path) -> None:
    """As files, or made: of GGUF, and where only config.json said which token ends a text."""
    text = "the 12 caf\u00e9s"
    theirs = checkpoint(tmp_path / "theirs", "llama")
    byte_level().save(str(theirs / "tokenizer.json"))
    config = json.loads((theirs / "config.json").read_text())
    config |= {"bos_token_id": 256, "eos_token_id": [256, 257]}
    (theirs / "config.json").write_text(json.dumps(config))
    (theirs / "generation_config.json").unlink()
    file = tmp_path / "model.gguf"
    write_gguf(file, gguf_model("llama", tied=True), gguf.GGMLQuantizationType.F32)
    for source in (theirs, file):
        out = tmp_path / f"{source.stem}-out"
        assert export(source, out, "--format", form) == 0
        expected, found = (open_source(path).tokenizer for path in (source, out))
        assert found.stop_ids == expected.stop_ids and found.bos_id == expected.bos_id
        assert found.prompt_ids(text) == expected.prompt_ids(text)
        if form != "native":
            read = AutoTokenizer.from_pretrained(out)
            assert read(text).input_ids == expected.encode(text)
            assert read.eos_token_id == expected.stop_ids[0]


@pytest.mark.parametrize("form", ["native", "hf"])
def test_the_tokenizer_of_a_saved_model(form: str, tmp_path: Path) -> None:
    OpenMythos(presets.tiny(), seed=0).save_pretrained(tmp_path / "own")
    ByteTokenizer().save(tmp_path / "own")
    assert export(tmp_path / "own", tmp_path / "out", "--format", form) == 0
    if form == "native":
        assert isinstance(open_source(tmp_path / "out").tokenizer, ByteTokenizer)
    else:
        ids = AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids
        assert ids == [ByteTokenizer.bos_id, ord("a")]
