"""Devices and their names."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from openmythos import machine
from openmythos.config import ConfigError
from openmythos.machine import choose_device, devices


def pretend(monkeypatch: pytest.MonkeyPatch, kind: str | None, count: int = 0) -> None:
    found = None if kind is None else torch.device(kind)

    def accelerator(check_available: bool = False) -> torch.device | None:
        # As a build of torch for CUDA answers on a machine without a GPU.
        return found if check_available else torch.device("cuda")

    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)


def test_without_an_accelerator_auto_is_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, None)
    assert devices() == ("cpu",)
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


def test_of_several_accelerators_a_rank_takes_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, "cuda", 2)
    assert devices() == ("cpu", "cuda:0", "cuda:1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:0")
    assert choose_device("cuda:1") == torch.device("cuda:1")
    assert choose_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda:1")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:2", "cuda:-1", "mps", "meta", "xla:0"])
def test_a_device_that_is_not_there_is_refused_in_one_line(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "cuda", 2)
    with pytest.raises(ConfigError) as caught:
        choose_device(name)
    assert str(caught.value) == (
        f"device = {name!r}: must be one of auto, cpu, cuda, cuda:0, cuda:1 on this machine"
    )


def test_the_field_is_named_and_only_what_is_there_is_offered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, None)
    with pytest.raises(ConfigError, match=r"^train.device = 'cuda': must be one of auto, cpu on"):
        choose_device("cuda", "train.device")


def test_a_cache_folder_keeps_what_was_used_last(tmp_path: Path) -> None:
    for age, name in enumerate(("new", "used", "old", "older")):
        (tmp_path / name).write_bytes(b"x" * 40)
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    machine.mark_used(tmp_path / "used")
    machine.keep_recent(tmp_path, most_bytes=100)
    assert {path.name for path in tmp_path.iterdir()} == {"new", "used"}
    machine.mark_used(tmp_path / "missing" / "file")


def test_huge_pages_change_no_number() -> None:
    x = torch.arange(3 << 20, dtype=torch.float32)
    machine.use_huge_pages(x.data_ptr(), x.nbytes)
    machine.use_huge_pages(x.data_ptr(), 100)  # less than a page: nothing
    assert torch.equal(x, torch.arange(3 << 20, dtype=torch.float32))


@pytest.mark.skipif(not machine._allows_huge_pages(), reason="no huge pages here")
def test_large_memory_is_in_huge_pages() -> None:
    def huge() -> int:
        text = Path("/proc/self/smaps_rollup").read_text()
        return int(next(line for line in text.splitlines() if "AnonHuge" in line).split()[1])

    x, before = torch.ones(8 << 20), huge()
    machine.use_huge_pages(x.data_ptr(), x.nbytes)
    assert huge() >= before + x.nbytes // 1024 // 2


_PRODUCTS = """
import re
from pathlib import Path
import torch
from openmythos.machine import bound_product_caches

def megabytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

bound_product_caches()
torch.set_num_threads(1)
weight = torch.ones(32, 32, dtype=torch.bfloat16)
for rows in range(2, 801):
    weight.new_ones(rows, 32) @ weight
    if rows == 400:
        before = megabytes()
print(megabytes() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_products_of_many_shapes_take_no_memory_once_the_caches_are_full() -> None:
    """Without the bound 400 further shapes take 200 MB, where the CPU has bf16 instructions."""
    found = subprocess.run(
        [sys.executable, "-c", _PRODUCTS], capture_output=True, text=True, check=True
    )
    assert float(found.stdout) < 10
