"""Launches gloo processes that train, for the tests of several ranks."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from variants import tiny_config

from openmythos.data.loader import Loader
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.distributed.ranks import exit_process, process_group
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.loop_lora import LoopLoRA
from openmythos.recurrence.loop_sampling import PoissonLoops
from openmythos.train.config import TrainConfig
from openmythos.train.trainer import StepMetrics, Trainer

SEQ, BATCH = 24, 4
MODEL = tiny_config(vocab_size=257, context=SEQ, loop_lora=LoopLoRA(rank=2, num_loops=2))
TRAIN = TrainConfig(
    num_steps=20,
    batch_size=BATCH,
    seq_len=SEQ,
    precision="fp32",
    loops=PoissonLoops(mean_loops=2.0, max_loops=5, per="sequence"),
)


def write_text(folder: Path) -> Path:
    """Write token shards of a short text."""
    documents = [Document(name=str(i), text=f"text number {i} " * 9) for i in range(20)]
    write_shards(documents, ByteTokenizer(), folder / "shards")
    return folder / "shards"


def trainer_of(shards: Path, model: Any, config: TrainConfig) -> Trainer:
    distributed = dist.is_initialized()
    loader = Loader(
        TokenShards.open(shards),
        seq_len=SEQ,
        batch_size=BATCH,
        seed=0,
        rank=dist.get_rank() if distributed else 0,
        world_size=dist.get_world_size() if distributed else 1,
    )
    return Trainer(OpenMythos(model, seed=0), loader, config)


def all_steps(shards: Path, model: Any, config: TrainConfig) -> list[StepMetrics]:
    return list(trainer_of(shards, model, config).steps())


class Collectives(TorchDispatchMode):
    """Records the names of the collectives called inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))

    def count(self, name: str) -> int:
        return sum(name in found for found in self.names)


def _work(rank: int, ranks: int, folder: Path, work: Callable[[Path], Any]) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        WORLD_SIZE=str(ranks),
        RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=(folder / "port").read_text(),
    )
    with process_group(torch.device("cpu")):
        found = work(folder)
    assert not dist.is_initialized()
    torch.save(found, folder / f"{ranks}-{rank}.pt")
    exit_process(0)


def launch(ranks: int, work: Callable[[Path], Any], folder: Path) -> list[Any]:
    """Run work(folder) in several processes; returns the results by rank."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        (folder / "port").write_text(str(free.getsockname()[1]))
    # The fork server imports torch once for all processes.
    multiprocessing.set_forkserver_preload(["openmythos.train.run", "torch.distributed.fsdp"])
    mp.start_processes(_work, args=(ranks, folder, work), nprocs=ranks, start_method="forkserver")
    return [torch.load(folder / f"{ranks}-{rank}.pt", weights_only=False) for rank in range(ranks)]


# (ranks, "sharded" or "experts") -> the folder with the shards, and what each rank's work returned.
Together = Callable[[int, str], tuple[Path, list[dict[str, Any]]]]


def all_work(folder: Path) -> dict[str, Any]:
    """All work that the tests of both files need from a rank."""
    import test_expert_parallel
    import test_sharded

    return {"sharded": test_sharded.work(folder), "experts": test_expert_parallel.work(folder)}


def by_ranks(cases: dict[str, tuple[int, Any, TrainConfig]]) -> list[Any]:
    """pytest parameters for these cases; those with four ranks are slow."""
    import pytest  # benchmarks/ranks_together.py uses this file without it

    return [
        pytest.param(name, marks=[pytest.mark.slow] if ranks > 2 else [])
        for name, (ranks, *_) in cases.items()
    ]


def assert_same_steps(
    found: list[dict[str, Any]], alone: list[StepMetrics], *, rough: bool = False
) -> None:
    """A rank's metrics equal those of one process; `rough`: if rounding errors grow."""
    assert len(found) == len(alone)
    for metrics, wanted in zip(found, alone, strict=True):
        expected = wanted.as_dict()
        for key in ("step", "tokens", "mean_loops", "skipped"):
            assert metrics[key] == expected[key], key
        if rough:
            assert abs(metrics["loss"] - expected["loss"]) < 2e-3 * expected["loss"]
            continue
        for key in ("state_rms", "residual"):
            for mine, theirs in zip(metrics[key], expected[key], strict=True):
                assert abs(mine - theirs) <= 1e-5 * max(1, theirs), key
        for key in ("loss", "total_loss", "gradient_norm", "balance", "ponder_cost"):
            difference = abs(metrics[key] - expected[key])
            assert difference <= 1e-5 * max(1, abs(expected[key])), (key, difference)
        assert metrics["max_violation"] == expected["max_violation"]
        assert abs(metrics["max_decay"] - expected["max_decay"]) < 1e-6
