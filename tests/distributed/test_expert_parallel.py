"""Training with expert parallelism over gloo processes equals training in one process."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import (
    BATCH,
    MODEL,
    TRAIN,
    Together,
    all_steps,
    assert_same_steps,
    by_ranks,
    trainer_of,
)
from torch.distributed.fsdp._fully_shard import _fsdp_common

from openmythos.config import ConfigError
from openmythos.distributed.expert_parallel import check_experts
from openmythos.distributed.parallelize import Parallel, parallelize
from openmythos.distributed.ranks import full_tensor
from openmythos.model.mythos import OpenMythos
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.moe import MoE
from openmythos.recurrence.exit_rules import StateChangeExit
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.loop_sampling import FixedLoops, UniformLoops, sample_loops
from openmythos.train.checkpoint import (
    CheckpointWriter,
    Counters,
    checkpoint_at,
    load_model,
    load_training,
)
from openmythos.train.config import TrainConfig
from openmythos.train.optim import Muon
from openmythos.train.trainer import Trainer

pytestmark = pytest.mark.distributed

SHORT = replace(TRAIN, num_steps=3)
# One rank finishes its rows long before the other.
UNEVEN = UniformLoops(min_loops=1, max_loops=6)
HALTING = replace(MODEL, halting=ACT(bias_init=-0.5))
# Experts outside the loops too; their number is not divisible by four.
EVERYWHERE = replace(
    MODEL,
    feed_forward=MoE(num_experts=2, top_k=1, expert_dim=16),
    recurrent_feed_forward=MoE(num_experts=6, top_k=2, expert_dim=16, bias_loops=2),
)
# (ranks, model, training) by name; `experts` is 2 in all.
CASES: dict[str, tuple[int, Any, TrainConfig]] = {
    "uneven loops": (2, MODEL, replace(SHORT, loops=UNEVEN)),
    "halting": (2, HALTING, SHORT),
    "recomputed": (2, HALTING, replace(SHORT, checkpoint_loops=True, loops=UNEVEN)),
    "truncated": (2, MODEL, replace(SHORT, backprop_loops=2, checkpoint_loops=True, loops=UNEVEN)),
    "everywhere": (2, EVERYWHERE, SHORT),
    "micro-batches": (
        2,
        MODEL,
        replace(SHORT, micro_batch_size=1, loops=FixedLoops(mean_loops=2)),
    ),
    "clipped": (2, MODEL, replace(SHORT, clip_norm=1e-3)),
    "bf16": (
        2,
        MODEL,
        replace(SHORT, num_steps=1, precision="bf16", loops=FixedLoops(mean_loops=2)),
    ),
    "muon": (2, EVERYWHERE, replace(SHORT, optimizer=Muon())),
    "sharded experts": (4, EVERYWHERE, replace(SHORT, loops=UNEVEN)),
    "replicas": (4, HALTING, replace(SHORT, parallel=Parallel(replicate=2))),
    "muon, sharded": (4, EVERYWHERE, replace(SHORT, optimizer=Muon())),
}
SAVED = {2: (MODEL, SHORT), 4: (EVERYWHERE, replace(SHORT, optimizer=Muon()))}


UNSPREAD: Any = {"device": torch.device("cpu"), "checkpoint_loops": False, "compiled": False}


def shared(config: TrainConfig) -> TrainConfig:
    return replace(config, parallel=replace(config.parallel, experts=2))


def contents(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and the optimizers' state, whole."""
    found = {**trainer.model.state_dict(), **trainer.optimizers.tensors()}
    return {name: full_tensor(x).clone() for name, x in found.items()}


def starts_as_alone(folder: Path, model: Any, config: TrainConfig) -> bool:
    """Whether a model initialised after sharding has the weights of a single process."""
    with torch.device("meta"):
        unmade = OpenMythos(model)
    trainer = Trainer(unmade, trainer_of(folder / "shards", model, TRAIN).source, config)
    made = OpenMythos(model, seed=config.seed).state_dict()
    return all(
        torch.equal(full_tensor(x), made[name]) for name, x in unmade.state_dict().items()
    ) and (trainer.device == torch.device("cpu"))


def save(folder: Path, trainer: Trainer) -> None:
    writer = CheckpointWriter(folder, keep=1)
    writer.save(trainer.model, trainer.optimizers, trainer.counters)
    writer.close()


def refusals() -> list[str]:
    """What is said of settings that do not divide, with two ranks."""
    three = replace(MODEL, recurrent_feed_forward=MoE(num_experts=3, expert_dim=16))
    said = []
    for model, experts in (
        (three, 3),
        (three, 2),
        (replace(MODEL, recurrent_feed_forward=SwiGLU()), 2),
    ):
        with pytest.raises(ConfigError) as refused:
            Trainer(OpenMythos(model), None, TrainConfig(parallel=Parallel(experts=experts)))  # type: ignore[arg-type]
        said.append(str(refused.value))
    return said


def prompts(rank: int) -> torch.Tensor:
    return torch.randint(257, (1 + rank, 8), generator=torch.Generator().manual_seed(rank))


# The second rank's positions go on when those of the first have stopped.
EXITS = (StateChangeExit(threshold=0.2), StateChangeExit(threshold=0.1))


def early_exits(model: OpenMythos) -> tuple[torch.Tensor, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        out = model(prompts(dist.get_rank()), num_loops=12, exit_rule=EXITS[dist.get_rank()])
    return out.logits, out.recurrence.loops_used


def work(folder: Path) -> dict[str, Any]:
    ranks = dist.get_world_size()
    found: dict[str, Any] = {
        name: [metrics.as_dict() for metrics in all_steps(folder / "shards", model, shared(config))]
        for name, (of, model, config) in CASES.items()
        if of == ranks
    }
    model, config = SAVED[ranks]
    trainer = trainer_of(folder / "shards", model, shared(config))
    halfway = checkpoint_at(folder / f"alone-{ranks}")
    trainer.counters = load_training(halfway, trainer.model, trainer.optimizers)
    found["read"] = contents(trainer)
    found["rest"] = [metrics.as_dict() for metrics in trainer.steps()]
    save(folder / f"together-{ranks}", trainer)
    found["saved"] = contents(trainer)
    found["starts"] = [
        starts_as_alone(folder, model, config)
        for model, config in ((MODEL, SHORT), (EVERYWHERE, shared(replace(SHORT, seed=5))))
    ]
    if ranks == 2:
        found["exits"] = early_exits(trainer.model)
        found["refused"] = refusals()
    return found


def go_alone(folder: Path, ranks: int) -> None:
    """One process saves for so many ranks to read, and goes on: alone-RANKS.pt has both."""
    model, config = SAVED[ranks]
    trainer = trainer_of(folder / "shards", model, config)
    steps = trainer.steps()
    for _ in range(2):
        next(steps)
    trainer.counters = Counters(step=2)
    save(folder / f"alone-{ranks}", trainer)
    halfway = contents(trainer)
    rest = list(trainer.steps())
    torch.save({"halfway": halfway, "rest": rest}, folder / f"alone-{ranks}.pt")


some_ranks = pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])


@pytest.mark.parametrize("name", by_ranks(CASES))
def test_ranks_that_share_experts_take_the_steps_of_one(together: Together, name: str) -> None:
    ranks, model, config = CASES[name]
    folder, ranks_found = together(ranks, "experts")
    rough = isinstance(config.optimizer, Muon) or config.precision == "bf16"
    alone = all_steps(folder / "shards", model, replace(config, parallel=Parallel()))
    assert len(alone) == config.num_steps
    for found in ranks_found:
        assert_same_steps(found[name], alone, rough=rough)


def test_ranks_run_different_numbers_of_loops() -> None:
    """Else nothing above would show that the ranks wait for each other."""
    for name in ("uneven loops", "truncated", "sharded experts"):
        ranks, _, config = CASES[name]
        drawn = [
            sample_loops(
                config.loops, config.curriculum, batch=BATCH, seed=0, step=step, num_steps=4
            )
            for step in range(config.num_steps)
        ]
        deepest = torch.stack(drawn).view(config.num_steps, ranks, -1).amax(dim=2)
        assert (deepest[:, 0] != deepest[:, 1]).any()


@some_ranks
def test_a_checkpoint_of_one_process_is_read_by_ranks(together: Together, ranks: int) -> None:
    folder, ranks_found = together(ranks, "experts")
    alone = torch.load(folder / f"alone-{ranks}.pt", weights_only=False)
    whole_state, rough = alone["halfway"], ranks == 4
    seen = set()
    for found in ranks_found:
        for name, x in found["read"].items():
            assert torch.equal(x, whole_state[name]), name
        seen |= set(found["read"])
        assert_same_steps(found["rest"], alone["rest"], rough=rough)
    assert seen == set(whole_state)


@some_ranks
def test_a_checkpoint_of_ranks_is_read_by_one_process(together: Together, ranks: int) -> None:
    model, config = SAVED[ranks]
    folder, ranks_found = together(ranks, "experts")
    trainer = trainer_of(folder / "shards", model, config)
    checkpoint = checkpoint_at(folder / f"together-{ranks}")
    assert load_training(checkpoint, trainer.model, trainer.optimizers).step == config.num_steps
    read = contents(trainer)
    for found in ranks_found:
        for name, x in found["saved"].items():
            assert torch.equal(x, read[name]), name


@some_ranks
def test_weights_that_are_made_in_shards_are_those_of_one_process(
    together: Together, ranks: int
) -> None:
    for found in together(ranks, "experts")[1]:
        assert found["starts"] == [True, True]


def test_positions_leave_early_on_each_rank_as_alone(together: Together) -> None:
    folder, ranks_found = together(2, "experts")
    model = load_model(checkpoint_at(folder / "together-2"))
    last = set()
    for rank, found in enumerate(ranks_found):
        logits, loops_used = found["exits"]
        with torch.no_grad():
            alone = model(prompts(rank), num_loops=12, exit_rule=EXITS[rank])
        assert torch.equal(loops_used, alone.recurrence.loops_used)
        torch.testing.assert_close(logits, alone.logits, rtol=1e-4, atol=1e-5)
        last.add(int(loops_used.max()))
    assert len(last) == 2 and max(last) < 12


def test_a_torch_that_cannot_shard_experts_apart_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(_fsdp_common, "ShardPlacementResult")
    with pytest.raises(ConfigError, match=r"^experts = 2: must be 1 with torch "):
        check_experts(OpenMythos(MODEL), 2)


def test_what_does_not_divide_is_refused(together: Together) -> None:
    for found in together(2, "experts")[1]:
        assert found["refused"] == [
            "experts = 3: must divide shard = 2",
            "experts = 2: must divide the number of routed experts = 3",
            "experts = 2: must be 1 for a model without routed experts",
        ]
    with pytest.raises(ConfigError, match="experts = 2: must divide shard"):
        parallelize(OpenMythos(MODEL), Parallel(experts=2), **UNSPREAD)
    with pytest.raises(ConfigError, match="experts = 0: must be an integer, at least 1"):
        Parallel(experts=0)


def test_what_ranks_cannot_do_equally_often_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.experts = 2: must be 1 with compile"):
        TrainConfig(parallel=Parallel(experts=2), compile=True)
