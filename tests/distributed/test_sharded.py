"""Training with sharded weights over gloo processes equals training in one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from ranks import (
    BATCH,
    MODEL,
    SEQ,
    TRAIN,
    Collectives,
    Together,
    all_steps,
    assert_same_steps,
    by_ranks,
    trainer_of,
    write_text,
)

from openmythos import machine
from openmythos.config import ConfigError
from openmythos.distributed.parallelize import Parallel
from openmythos.distributed.ranks import sum_over_ranks
from openmythos.model import presets
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.loop_sampling import FixedLoops, Granularity, PoissonLoops
from openmythos.studies.learning import TASK_TRAINING, on_task
from openmythos.tasks import KHop
from openmythos.train.config import TiedLoops, TrainConfig
from openmythos.train.loss import DeepSupervision
from openmythos.train.optim import Muon
from openmythos.train.precision import Dtypes, choose
from openmythos.train.task_source import task_trainer

pytestmark = pytest.mark.distributed

GRANULARITIES = get_args(Granularity)

SHORT = replace(TRAIN, num_steps=4)
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
    "shards": (2, MODEL, replace(SHORT, num_steps=6)),
    "halting": (2, HALTING, SHORT),
    "micro-batches": (2, MODEL, replace(SHORT, micro_batch_size=1, loops=BATCHWISE)),
    "checkpointing": (2, MODEL, replace(SHORT, checkpoint_loops=True)),
    "bf16": (2, MODEL, BF16),
    "muon": (2, MODEL, replace(SHORT, optimizer=Muon())),
    "truncated": (2, MODEL, replace(SHORT, backprop_loops=1)),
    "two groups of two": (4, MODEL, replace(SHORT, parallel=Parallel(replicate=2, shard=2))),
}


HOPS = on_task(
    replace(presets.hops(), dim=32),
    KHop(),
    replace(TASK_TRAINING, num_steps=6, batch_size=4, loops=TiedLoops(extra=2), device="cpu"),
    max_hops=6,
    mastery=1e-3,
)


def all_gathers(shards: Path, num_loops: int) -> int:
    config = replace(TRAIN, loops=FixedLoops(mean_loops=num_loops))
    trainer = trainer_of(shards, MODEL, config)
    with Collectives() as found:
        trainer.run_step()
    return found.count("allgather")


def first_step(shards: Path, per: Any) -> dict[str, Any]:
    """The loops and router counts of this process in its first step."""
    config = TrainConfig(
        num_steps=1, batch_size=BATCH, seq_len=SEQ, loops=PoissonLoops(max_loops=8, per=per)
    )
    trainer = trainer_of(shards, MODEL, config)
    model = trainer.model
    heard: dict[str, Any] = {}

    losses = model.losses

    def note_loops(*args: Any, **options: Any) -> Any:
        heard["loops"] = options["num_loops"]
        return losses(*args, **options)

    update = model.update_router_bias

    def note_counts(counts: dict[str, torch.Tensor], scale: float) -> None:
        heard["counts"] = {name: count.clone() for name, count in counts.items()}
        update(counts, scale)

    model.losses = note_loops  # type: ignore[method-assign]
    model.update_router_bias = note_counts  # type: ignore[method-assign, assignment]
    metrics = trainer.run_step()
    heard["tokens"], heard["max_violation"] = metrics.tokens, metrics.max_violation
    heard["buffers"] = dict(model.named_buffers())
    heard["sum"] = sum_over_ranks(torch.tensor([1.0 + trainer.rank]))
    return heard


def choices(rank: int) -> list[Dtypes]:
    """Where only the first rank has bf16, and it alone sees what the run began with."""
    bf16 = Dtypes(model="bf16", muon="bf16")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine, "bf16_is_native", lambda _device: rank == 0)
        device = torch.device("cpu")
        return [choose("auto", device, kept) for kept in (None, None if rank else bf16)]


def work(folder: Path) -> dict[str, Any]:
    ranks = dist.get_world_size()
    found: dict[str, Any] = {
        name: [metrics.as_dict() for metrics in all_steps(folder / "shards", *case[1:])]
        for name, case in CASES.items()
        if case[0] == ranks
    }
    if ranks == 2:
        found["choices"] = choices(dist.get_rank())
        found["hops"] = [metrics.as_dict() for metrics in task_trainer(HOPS).steps()]
        found["heard"] = {per: first_step(folder / "shards", per) for per in GRANULARITIES}
        found["gathers"] = [all_gathers(folder / "shards", n) for n in (1, 4, 9)]
        with pytest.raises(ConfigError, match="replicate = 3: times shard = 1 must be"):
            Parallel(replicate=3).mesh("cpu")
        with pytest.raises(ConfigError, match=r"loss\.kind = 'deep': wants loops\.per = \"batch\""):
            trainer_of(folder / "shards", MODEL, replace(SHORT, loss=DeepSupervision()))
    return found


@pytest.mark.parametrize("name", by_ranks(CASES))
def test_ranks_together_take_the_steps_of_one(together: Together, name: str) -> None:
    ranks, model, config = CASES[name]
    folder, found = together(ranks, "sharded")
    # Muon magnifies what is small in a gradient; in bf16 a last bit makes other choices of experts.
    rough = isinstance(config.optimizer, Muon) or config.precision == "bf16"
    alone = all_steps(folder / "shards", model, replace(config, parallel=Parallel()))
    assert len(alone) == config.num_steps
    for rank in range(ranks):
        assert_same_steps(found[rank][name], alone, rough=rough)


def test_ranks_share_a_curriculum(together: Together) -> None:
    alone = list(task_trainer(HOPS).steps())
    reached = [metrics.data["hops"] for metrics in alone]
    assert reached[0] < reached[-1] == 6
    for found in together(2, "sharded")[1]:
        assert_same_steps(found["hops"], alone)
        assert [metrics["hops"] for metrics in found["hops"]] == reached


@pytest.mark.parametrize("per", GRANULARITIES)
def test_two_ranks_hear_what_one_hears(together: Together, per: Any) -> None:
    folder, found = together(2, "sharded")
    alone = first_step(folder / "shards", per)
    ranks = [rank["heard"][per] for rank in found]
    for heard in ranks:
        assert heard["counts"].keys() == alone["counts"].keys()
        for name, counts in alone["counts"].items():
            assert torch.equal(heard["counts"][name], counts), name
        for name, buffer in alone["buffers"].items():
            assert torch.equal(heard["buffers"][name], buffer), name
        assert heard["tokens"] == alone["tokens"] == BATCH * SEQ
        assert float(heard["sum"]) == 3.0
    if per == "batch":
        assert [heard["loops"] for heard in ranks] == [alone["loops"]] * 2
    else:
        assert torch.equal(torch.cat([heard["loops"] for heard in ranks]), alone["loops"])


def test_weights_that_travel_in_bf16_want_autocast() -> None:
    with pytest.raises(
        ConfigError, match=r"parallel\.gather = 'bf16': must be fp32 with precision"
    ):
        TrainConfig(precision="fp32", parallel=Parallel(gather="bf16"))


def test_ranks_agree_on_the_precision(together: Together) -> None:
    fp32, bf16 = (Dtypes(model=name, muon=name) for name in ("fp32", "bf16"))
    assert [rank["choices"] for rank in together(2, "sharded")[1]] == [[fp32, bf16]] * 2


def test_auto_that_is_fp32_gathers_no_bf16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards = write_text(tmp_path)
    config = TrainConfig(seq_len=SEQ, batch_size=BATCH, parallel=Parallel(gather="bf16"))
    monkeypatch.setattr(machine, "bf16_is_native", lambda _device: False)
    with pytest.raises(ConfigError, match=r"gather = 'bf16': must be .* = fp32, which auto is on"):
        trainer_of(shards, MODEL, config)
    monkeypatch.setattr(machine, "bf16_is_native", lambda _device: True)
    assert trainer_of(shards, MODEL, config).dtypes == Dtypes(model="bf16", muon="bf16")


def test_weights_are_gathered_as_often_for_many_loops_as_for_one(together: Together) -> None:
    for found in together(2, "sharded")[1]:
        one, *more = found["gathers"]
        assert more == [one, one]
        # Forward and backward of prelude, recurrent block and coda; the rest stays gathered.
        assert one == 2 * 3 + 1
