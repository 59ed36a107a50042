"""The dtypes of a run: chosen once, kept with it, told in a line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from openmythos import machine
from openmythos.config import ConfigError
from openmythos.train.precision import FILE, Dtypes, choose, line, read, write

CPU = torch.device("cpu")
BF16, FP32 = Dtypes(model="bf16", muon="bf16"), Dtypes(model="fp32", muon="fp32")
EMULATED = Dtypes(model="bf16", muon="fp32")


@pytest.fixture(params=[False, True], ids=["no bf16", "bf16"])
def native(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(machine, "bf16_is_native", lambda _device=CPU: request.param)
    monkeypatch.setattr(machine, "bf16_slowdown", lambda _device: 0.5 if request.param else 600.0)
    return request.param


def test_muon_never_computes_in_emulated_bf16(native: bool) -> None:
    assert choose("auto", CPU) == (BF16 if native else FP32)
    assert choose("bf16", CPU) == (BF16 if native else EMULATED)
    assert choose("fp32", CPU) == FP32


def test_a_run_goes_on_as_it_began_unless_told_otherwise(native: bool) -> None:
    for kept in (BF16, FP32, EMULATED):
        assert choose("auto", CPU, kept) == kept
        assert choose(kept.model, CPU, kept) == kept
    assert choose("fp32", CPU, BF16) == FP32
    assert choose("bf16", CPU, FP32) == (BF16 if native else EMULATED)


def test_the_choice_is_told_in_one_line(native: bool) -> None:
    found = "bf16" if native else "fp32"
    assert line("auto", choose("auto", CPU), None, CPU) == (
        f"precision: {found} on cpu, the fast one here"
    )
    assert line("auto", FP32, FP32, CPU) == "precision: fp32 on cpu, as the run began"
    assert line("fp32", FP32, None, CPU) == "precision: fp32 on cpu"
    assert line("bf16", choose("bf16", CPU), None, CPU).startswith("warning: ") != native


def test_it_is_stored_with_what_it_ran_on(tmp_path: Path, native: bool) -> None:
    assert read(tmp_path) is None
    write(tmp_path, EMULATED, CPU)
    assert read(tmp_path) == EMULATED
    stored = json.loads((tmp_path / FILE).read_text())
    assert stored["device"] == "cpu" and stored["torch"] == torch.__version__
    assert {"cpu", "capability", "bf16_is_native", "threads"} <= stored.keys()
    (tmp_path / FILE).write_text('{"precision": {"model": "fp16", "muon": "fp32"}}')
    with pytest.raises(ConfigError, match=rf"{FILE}: precision.model = 'fp16': .* bf16, fp32"):
        read(tmp_path)
