"""How an arm of a study learns a task of hops, and how it is asked afterwards."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from openmythos.config import require, require_int, require_number
from openmythos.model.mythos import OpenMythos
from openmythos.planning import cost
from openmythos.recurrence.loop_sampling import LoopSampling, NoCurriculum, sample_loops
from openmythos.tasks import Task
from openmythos.train.loss import FinalLoss, training_loss
from openmythos.train.optim import WSD, AdamW, Optimizer, Schedule
from openmythos.types import LoopCounts


@dataclass(frozen=True, kw_only=True)
class TiedLoops:
    """As many loops as the problem has hops, and uniformly 0 ... extra more."""

    kind: Literal["tied"] = "tied"
    extra: int = 6

    def __post_init__(self) -> None:
        require_int("extra", self.extra, minimum=0)


@dataclass(frozen=True, kw_only=True)
class Learning:
    """Problems of 1 ... max_hops hops, longer ones as the shorter ones are mastered.

    A step draws hops uniformly from `min_hops` to the curriculum's reach, which starts at
    `first_hops` and grows by two whenever the running accuracy at the answer of its longest quarter
    passes `mastery` (first_hops = max_hops: no curriculum). Of its loops the last `backprop_loops`
    carry gradient (0: all).
    """

    kind: Literal["task"] = "task"
    num_steps: int = 1600
    batch_size: int = 32
    min_hops: int = 1
    max_hops: int = 20
    first_hops: int = 2
    mastery: float = 0.8
    loops: TiedLoops | LoopSampling = field(default_factory=TiedLoops)
    backprop_loops: int = 0
    optimizer: Optimizer = field(
        default_factory=lambda: AdamW(lr=3e-3, weight_decay=0.05, beta1=0.9, beta2=0.98)
    )
    schedule: Schedule = field(default_factory=lambda: WSD(warmup=0.03, decay=0.3, final=0.05))
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "min_hops", "max_hops", "first_hops"):
            require_int(name, getattr(self, name), minimum=1)
        require_int("backprop_loops", self.backprop_loops, minimum=0)
        require_number("mastery", self.mastery, above=0, at_most=1)
        require_number("clip_norm", self.clip_norm, above=0)
        fits = self.min_hops <= self.first_hops <= self.max_hops
        allowed = f"must be from min_hops = {self.min_hops} to max_hops = {self.max_hops}"
        require(fits, "first_hops", self.first_hops, allowed)


class Progress(NamedTuple):
    step: int
    loss: float
    reach: int  # hops that the curriculum has come to
    flops: int | float  # of this step, forward and backward


def learn(model: OpenMythos, task: Task, learning: Learning, seed: int) -> Iterator[Progress]:
    """Train the model in place, a step per item; a function of its arguments."""
    generator = torch.Generator().manual_seed(seed + 1)
    torch.manual_seed(seed + 1)
    optimizers = learning.optimizer.build(model)
    reach, mastered = learning.first_hops, 0.5
    flops = cost.TrainingFlops(model.config, context=learning.max_hops)
    model.train()
    for step in range(learning.num_steps):
        hops = int(torch.randint(learning.min_hops, reach + 1, (), generator=generator))
        batch = task.sample(learning.batch_size, hops, generator).to(model.device)
        loops = _loops(learning, hops, step, seed, generator)
        losses = model.losses(
            batch.tokens,
            batch.targets,
            num_loops=loops,
            backprop_loops=learning.backprop_loops,
        )
        torch.autograd.backward(training_loss(losses, FinalLoss(), model.config).total)
        torch.nn.utils.clip_grad_norm_(model.parameters(), learning.clip_norm)
        optimizers.step(learning.schedule.scale(step, learning.num_steps))
        model.zero_grad(set_to_none=True)
        model.update_router_bias({name: stats.counts for name, stats in losses.router.items()})
        if reach < learning.max_hops and hops >= 0.75 * reach:
            right = accuracy_of(model.train(False), batch.tokens, batch.answers(), loops)
            model.train()
            mastered = 0.8 * mastered + 0.2 * right
            if mastered > learning.mastery:
                reach, mastered = min(reach + 2, learning.max_hops), 0.5
        drawn = [loops] if isinstance(loops, int) else loops.tolist()
        per_token = [flops.per_token(n, learning.backprop_loops) for n in drawn]
        loss = float(losses.cross_entropy.detach())
        yield Progress(step, loss, reach, batch.tokens.numel() * sum(per_token) / len(per_token))


def _loops(
    learning: Learning, hops: int, step: int, seed: int, generator: torch.Generator
) -> int | LoopCounts:
    """Of a step: one number, or one per sequence where they are drawn so."""
    if isinstance(learning.loops, TiedLoops):
        return hops + int(torch.randint(learning.loops.extra + 1, (), generator=generator))
    drawn = sample_loops(
        learning.loops,
        NoCurriculum(),
        batch=learning.batch_size,
        seed=seed,
        step=step,
        num_steps=learning.num_steps,
    )
    return drawn if learning.loops.per == "sequence" else int(drawn[0])


@torch.no_grad()
def accuracy_of(
    model: OpenMythos, tokens: torch.Tensor, answers: torch.Tensor, loops: int | LoopCounts
) -> float:
    """Share of answers right at the last position."""
    logits = model(tokens, num_loops=loops, last_only=True).logits[:, 0]
    return float((logits.argmax(dim=-1) == answers).float().mean())


@torch.no_grad()
def accuracy_map(
    model: OpenMythos,
    task: Task,
    hops: tuple[int, ...],
    loops: tuple[int, ...],
    *,
    examples: int = 400,
    seed: int = 10_000,
) -> dict[int, dict[int, float]]:
    """found[h][T]: share of right answers at h hops after T loops, all T from one pass."""
    model.eval()
    found: dict[int, dict[int, float]] = {}
    for hop in hops:
        generator = torch.Generator().manual_seed(seed + hop)
        batch = task.sample(examples, hop, generator).to(model.device)
        output = model(batch.tokens, num_loops=max(loops), collect_loops=loops, last_only=True)
        by_loops = dict(zip(output.recurrence.collected, output.loop_logits, strict=True))
        found[hop] = {}
        for loop in loops:
            logits = by_loops.get(loop, output.logits)[:, 0]
            right = logits.argmax(dim=-1) == batch.answers()
            found[hop][loop] = float(right.float().mean())
    return found
