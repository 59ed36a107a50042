"""What the machine can do: bf16, asked of torch and timed."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from openmythos import machine
from openmythos.config import ConfigError

CPU = torch.device("cpu")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A CPU that says that it has AVX512_BF16."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    return monkeypatch


@pytest.mark.parametrize(("slowdown", "native"), [(0.5, True), (4.0, True), (99.0, False)])
def test_what_a_processor_says_is_confirmed_by_a_product(
    said: pytest.MonkeyPatch, slowdown: float, native: bool
) -> None:
    said.setattr(machine, "bf16_slowdown", lambda _device: slowdown)
    assert machine.bf16_is_native() == native
    assert machine.choose_precision("auto", CPU) == ("bf16" if native else "fp32")
    assert machine.fast_dtype(CPU) == (torch.bfloat16 if native else torch.float32)


def test_a_processor_that_says_it_has_none_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    monkeypatch.setattr(machine, "bf16_slowdown", lambda _device: pytest.fail("timed"))
    assert machine.choose_precision("auto", CPU) == "fp32"


def test_a_precision_asked_for_by_name_is_honoured_and_warned_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "bf16_is_native", lambda _device=CPU: False)
    assert machine.choose_precision("bf16", CPU) == "bf16"
    assert machine.choose_precision("fp32", CPU) == "fp32"
    for slowdown, warned in ((1.9, False), (600.0, True)):
        monkeypatch.setattr(machine, "bf16_slowdown", lambda _device, times=slowdown: times)
        line = machine.slow_precision("bf16", CPU)
        assert (line is not None) == warned
        assert machine.slow_precision("fp32", CPU) is None
    assert line is not None and "600 times as long" in line and "\n" not in line
    monkeypatch.setattr(machine, "bf16_is_native", lambda _device=CPU: True)
    assert machine.slow_precision("bf16", CPU) is None


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(ConfigError, match=r"precision = 'fp16': must be one of bf16, fp32, auto"):
        machine.choose_precision("fp16", CPU)


def test_kernels_without_bf16_are_found_out() -> None:
    """With the variables that take its bf16 from a processor, in a process of their own."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        pytest.skip("the variables are for x86 processors")
    code = """
import torch
from openmythos import machine
torch.cpu._is_avx512_bf16_supported = lambda: True
print(machine.bf16_is_native())
"""
    variables = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}
    found = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True
    )
    assert found.stdout.split() == ["False"]


def test_slow_products_are_timed_three_times_and_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Emulated, a product of a usual width takes seconds. One thread waits for no other."""
    shapes, threads, multiply = [], set(), torch.mm

    def counted(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        shapes.append((*a.shape, b.shape[1]))
        threads.add(torch.get_num_threads())
        return multiply(a, b, out=out)

    clock = itertools.count()
    monkeypatch.setattr(machine.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(torch, "mm", counted)
    before = torch.get_num_threads()
    assert machine.bf16_slowdown.__wrapped__(CPU) == 1  # the clock gives each product one second
    assert len(shapes) == 6
    assert max(max(shape) for shape in shapes) <= 128
    assert threads == {1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("native", [False, True])
def test_the_peak_is_that_of_the_best_width(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    """Of a CPU that is fastest at 512 and, in bf16, emulated: then one small width must do."""
    asked: list[int] = []

    def seconds(_device: object, dtype: torch.dtype, width: int, most: float) -> float:
        asked.append(width)
        rate = {128: 40e9, 256: 80e9, 512: 90e9}.get(width, 85e9)
        return 2 * width**3 / (rate if native or dtype == torch.float32 else 0.3e9)

    monkeypatch.setattr(machine, "_product_seconds", seconds)
    assert machine.measure_matmul_peak(CPU, torch.float32) == pytest.approx(90e9)
    assert asked == [128, 256, 512, 1024]
    asked.clear()
    machine.measure_matmul_peak(CPU, torch.bfloat16)
    assert asked == ([128, 256, 512, 1024] if native else [128])


def test_the_peak_is_measured_once_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([1e9, 2e9, 3e9])
    monkeypatch.setattr(machine, "measure_matmul_peak", lambda *_: next(measured))
    machine._peak_with.cache_clear()
    asked = (torch.float32, torch.bfloat16, torch.float32)
    assert [machine.matmul_peak(CPU, dtype) for dtype in asked] == [1e9, 2e9, 1e9]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert machine.matmul_peak(CPU, torch.float32) == 3e9
    machine._peak_with.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_peak_of_this_machine_can_be_measured(dtype: torch.dtype) -> None:
    assert machine.measure_matmul_peak(CPU, dtype) > 0
