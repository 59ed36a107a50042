"""Weights in shards over gloo processes train as one process does."""

import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils._python_dispatch import TorchDispatchMode
from variants import tiny_config

from openmythos.config import ConfigError
from openmythos.data.loader import Loader
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.conditioning import LoopLoRA
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.loop_sampling import FixedLoops, PoissonLoops
from openmythos.train.config import TrainConfig
from openmythos.train.optim import Muon
from openmythos.train.parallel import Parallel, leave, process_group
from openmythos.train.trainer import StepMetrics, Trainer

pytestmark = pytest.mark.distributed

SEQ, BATCH = 24, 4
MODEL = tiny_config(vocab_size=257, context=SEQ, loop_lora=LoopLoRA(rank=2, num_loops=2))
TRAIN = TrainConfig(
    num_steps=20,
    batch_size=BATCH,
    seq_len=SEQ,
    loops=PoissonLoops(mean_loops=2.0, max_loops=5, per="sequence"),
)
SHORT = replace(TRAIN, num_steps=6)
# Few shapes: a CPU compiles its bf16 kernels for each.
BF16 = replace(
    TRAIN,
    num_steps=2,
    precision="bf16",
    loops=FixedLoops(mean_loops=2),
    parallel=Parallel(gather="bf16"),
)
HALTING = replace(MODEL, halting=ACT(bias_init=-0.5))
BATCHWISE = PoissonLoops(mean_loops=2.0, max_loops=5, per="batch")
# (ranks, model, training) by name; batchwise where micro-batches would weigh loops differently.
CASES: dict[str, tuple[int, Any, TrainConfig]] = {
    "shards": (2, MODEL, TRAIN),
    "halting": (2, HALTING, SHORT),
    "micro-batches": (2, MODEL, replace(SHORT, micro_batch_size=1, loops=BATCHWISE)),
    "recomputed loops": (2, MODEL, replace(SHORT, checkpoint_loops=True)),
    "bf16": (2, MODEL, BF16),
    "muon": (2, MODEL, replace(SHORT, optimizer=Muon())),
    "truncated": (2, MODEL, replace(SHORT, backprop_loops=1)),
    "two groups of two": (4, MODEL, replace(SHORT, parallel=Parallel(replicate=2, shard=2))),
}


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
    """Names of the collectives that are called inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def all_gathers(shards: Path, num_loops: int) -> int:
    config = replace(TRAIN, loops=FixedLoops(mean_loops=num_loops))
    trainer = trainer_of(shards, MODEL, config)
    with Collectives() as found:
        trainer.run_step()
    return sum("allgather" in name for name in found.names)


def worker(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        WORLD_SIZE=str(ranks),
        RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=(Path(folder) / "port").read_text(),
    )
    with process_group(torch.device("cpu")):
        found: dict[str, Any] = {
            name: [metrics.as_dict() for metrics in all_steps(Path(folder) / "shards", *case[1:])]
            for name, case in CASES.items()
            if case[0] == ranks
        }
        if ranks == 2:
            found["gathers"] = [all_gathers(Path(folder) / "shards", n) for n in (1, 4, 9)]
            with pytest.raises(ConfigError, match="replicate = 3: times shard = 1 must be"):
                Parallel(replicate=3).mesh("cpu")
    assert not dist.is_initialized()
    torch.save(found, Path(folder) / f"{ranks}-{rank}.pt")
    leave(0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two and four processes have written what they measured."""
    path = tmp_path_factory.mktemp("shards")
    documents = [Document(name=str(i), text=f"text number {i} " * 9) for i in range(20)]
    write_shards(documents, ByteTokenizer(), path / "shards")
    for ranks in (2, 4):
        with socket.create_server(("127.0.0.1", 0)) as free:
            (path / "port").write_text(str(free.getsockname()[1]))
        mp.spawn(worker, args=(ranks, str(path)), nprocs=ranks)
    return path


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_take_the_steps_of_one(folder: Path, name: str) -> None:
    ranks, model, config = CASES[name]
    # Where bf16 is used (Muon does), a last bit makes much, even other choices of experts.
    rough = isinstance(config.optimizer, Muon) or config.precision == "bf16"
    alone = all_steps(folder / "shards", model, replace(config, parallel=Parallel()))
    for rank in range(ranks):
        found = torch.load(folder / f"{ranks}-{rank}.pt")[name]
        assert len(found) == config.num_steps
        for metrics, wanted in zip(found, alone, strict=True):
            expected = wanted.as_dict()
            for key in ("step", "tokens", "mean_loops", "skipped"):
                assert metrics[key] == expected[key], key
            if rough:
                assert metrics["loss"] == pytest.approx(expected["loss"], rel=2e-3)
                continue
            for key in ("loss", "total_loss", "gradient_norm", "balance", "ponder_cost"):
                assert metrics[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key
            for key in ("state_rms", "residual"):
                assert metrics[key] == pytest.approx(expected[key], rel=1e-5), key
            assert metrics["max_violation"] == expected["max_violation"]
            assert metrics["max_decay"] == pytest.approx(expected["max_decay"], rel=1e-6)


def test_weights_that_travel_in_bf16_want_autocast() -> None:
    with pytest.raises(
        ConfigError, match=r"parallel\.gather = 'bf16': must be fp32 with precision"
    ):
        TrainConfig(parallel=Parallel(gather="bf16"))


def test_weights_are_gathered_as_often_for_many_loops_as_for_one(folder: Path) -> None:
    for rank in range(2):
        one, *more = torch.load(folder / f"2-{rank}.pt")["gathers"]
        assert more == [one, one]
        # Forward and backward of prelude, recurrent block and coda; the rest stays gathered.
        assert one == 2 * 3 + 1
