"""Exports under peft and trl, which have a virtual environment of their own."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.test_export_outside import environment, other_python, small_models

from openmythos.data.tokenizer import ByteTokenizer
from openmythos.hub import export

PACKAGES = ("peft==0.21.2", "trl==1.16.0")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("finetune")
    python = other_python("finetune", *PACKAGES)
    torch.manual_seed(0)
    for name, model in small_models().items():
        export.write(model, folder / name, text=export.Text(tokenizer=ByteTokenizer()))
    names = environment(folder, with_package=False) | {"HF_DATASETS_CACHE": str(folder / "data")}
    command = [python, Path(__file__).with_name("finetune_outside.py"), folder]
    done = subprocess.run(command, capture_output=True, text=True, env=names)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads((folder / "found.json").read_text())


def test_lora_trains_decodes_saves_and_merges(found: Any) -> None:
    assert len(found["peft"]) == 5
    for targets, numbers in found["peft"].items():
        assert numbers["last"] < numbers["first"] - 0.1, targets
        assert numbers["changed"] > 1e-2, targets
        assert numbers["cache"] == 0, targets
        assert numbers["read_back"] == 0, targets
        assert numbers["merged"] < 1e-4, targets


def test_the_sft_trainer_runs(found: Any) -> None:
    sft = found["sft"]
    assert sft["checkpointed"] == pytest.approx(sft["plain"], rel=1e-5)
    for way, losses in sft.items():
        assert len(losses) == 3 and losses[-1] < losses[0], way
