"""The scripts of examples/ run as they are."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub.test_export_finetune import PACKAGES
from hub.test_export_outside import environment, other_python, small_models

import openmythos
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.hub import export

EXAMPLES = Path(__file__).parents[1] / "examples"
ON_AN_EXPORT = ("lora_with_peft.py", "finetune_with_trl.py")


def test_every_example_is_short_and_tested() -> None:
    files = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.glob("*")}
    assert files.keys() == {"load_public_model.py", *ON_AN_EXPORT}
    assert max(files.values()) <= 60


def test_load_public_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["load_public_model.py"])
    runpy.run_path(str(EXAMPLES / "load_public_model.py"), run_name="__main__")
    shown = capsys.readouterr().out
    few, many = (re.search(rf"{n} loops: (.*)", shown) for n in (2, 16))
    assert few is not None and many is not None and few[1] != many[1]
    changes = [float(number) for number in re.findall(r"-> \d+ +([\d.]+)", shown)]
    assert len(changes) == 8 and changes[0] > 10 * changes[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ON_AN_EXPORT)
def test_fine_tuning_an_export(name: str, tmp_path: Path) -> None:
    python = other_python("finetune", *PACKAGES)
    torch.manual_seed(0)
    model = small_models()["tied"]
    export.write(model, tmp_path / "hub", text=export.Text(tokenizer=ByteTokenizer()))
    names = environment(tmp_path, with_package=False)
    names |= {"HF_DATASETS_CACHE": str(tmp_path / "data")}
    done = subprocess.run(
        [python, EXAMPLES / name, "hub", "tuned"],
        capture_output=True,
        text=True,
        env=names,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"loss\W+([\d.]+)", done.stdout)]
    assert len(losses) >= 4 and min(losses) < losses[0] - 0.1, done.stdout
    assert "8 loops" in done.stdout
    tuned = openmythos.load(tmp_path / "tuned")
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert not torch.allclose(tuned(tokens).logits, model(tokens).logits, atol=1e-2)
