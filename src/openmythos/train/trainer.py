"""The training loop.

A step is a function of (config, seed, step) and the state before it: data order, loops and noise
are drawn from (seed, step), so a resumed run goes on exactly as the uninterrupted one.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from openmythos.data.loader import Batch, Loader
from openmythos.model.mythos import OpenMythos
from openmythos.nn.moe import RouterStats
from openmythos.recurrence.injection import LTIInjection
from openmythos.recurrence.loop_sampling import sample_loops
from openmythos.train.config import TrainConfig
from openmythos.train.loss import LossParts, training_loss
from openmythos.train.parallel import (
    clip_gradients,
    mean_over_ranks,
    rank_and_world_size,
    reduce_gradients,
    spread,
    sum_over_ranks,
    whole,
)


@dataclass(frozen=True)
class StepMetrics:
    """What a step did; losses are means over its tokens."""

    step: int
    loss: float  # cross-entropy, nats per token
    total_loss: float
    gradient_norm: float
    lr_scale: float
    mean_loops: float
    tokens: int
    tokens_per_second: float
    balance: float
    max_violation: float  # of the busiest expert, over recurrent MoE layers
    ponder_cost: float
    max_decay: float
    skipped: int  # steps so far whose loss or gradient was not finite: nothing was changed

    def as_dict(self) -> dict[str, int | float]:
        return asdict(self)


class Trainer:
    """Trains a model on a loader's batches from step `step` on."""

    def __init__(
        self,
        model: OpenMythos,
        loader: Loader,
        config: TrainConfig,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self.loader, self.config = loader, config
        self.device = next(model.parameters()).device
        self.model = spread(
            model,
            config.parallel,
            checkpoint_loops=config.checkpoint_loops,
            compiled=config.compile,
        )
        self.optimizers = config.optimizer.build(self.model)
        self.step = 0
        self.skipped = 0
        self.stopping = False  # as of the last step, whether some rank was asked to
        self._asked_to_stop = stopping
        self.rank, self.world_size = rank_and_world_size()

    def steps(self) -> Iterator[StepMetrics]:
        """Run the remaining steps, yielding after each; stop iterating to stop training."""
        while self.step < self.config.num_steps:
            metrics = self.run_step()
            self.step += 1
            yield metrics

    def run_step(self) -> StepMetrics:
        started = time.perf_counter()
        c = self.config
        # Noise of the initial state; nothing else in a step draws from the global generator.
        torch.manual_seed((c.seed * 1_000_003 + self.step) * 1_009 + self.rank)
        batch = self.loader.batch(self.step)
        loops = sample_loops(
            c.loops,
            c.curriculum,
            batch=c.batch_size,
            seed=c.seed,
            step=self.step,
            num_steps=c.num_steps,
        )
        mean_loops, rows = float(loops.float().mean()), len(batch.tokens)
        loops = loops[self.rank * rows : (self.rank + 1) * rows]
        self.model.train()
        parts, router = self._backward(batch, loops)
        stop = parts.total.new_tensor(float(self._asked_to_stop()))
        *means, stop = mean_over_ranks([*parts, stop])
        parts, self.stopping = LossParts(*means), bool(stop > 0)
        norm = clip_gradients(self.model.parameters(), c.clip_norm)
        scale = c.schedule.scale(self.step, c.num_steps)
        counts = {name: sum_over_ranks(stats.counts) for name, stats in router.items()}
        # Of numbers that all ranks share, so that all skip or none.
        if bool(parts.total.isfinite() & norm.isfinite()):
            self.optimizers.step(scale)
            self.model.update_router_bias(counts)
        else:
            self.skipped += 1
        self.model.zero_grad(set_to_none=True)
        elapsed = time.perf_counter() - started
        violations = [float(stats.max_violation()) for stats in router.values()]
        return StepMetrics(
            step=self.step,
            loss=float(parts.cross_entropy),
            total_loss=float(parts.total),
            gradient_norm=float(norm),
            lr_scale=scale,
            mean_loops=mean_loops,
            tokens=batch.tokens.numel() * self.world_size,
            tokens_per_second=batch.tokens.numel() * self.world_size / elapsed,
            balance=float(parts.balance),
            max_violation=max(violations, default=0.0),
            ponder_cost=float(parts.ponder_cost),
            max_decay=self._max_decay(),
            skipped=self.skipped,
        )

    def _backward(self, batch: Batch, loops: Tensor) -> tuple[LossParts, dict[str, RouterStats]]:
        """Gradients of a step over its micro-batches; losses averaged, router statistics summed."""
        c = self.config
        size = min(c.micro_size, len(batch.tokens))
        pieces = range(0, len(batch.tokens), size)
        router: dict[str, RouterStats] = {}
        sums: list[Tensor] | None = None
        # One number suffices where all agree, and spares sorting the batch.
        per_sequence = c.loops.per == "sequence"
        for start in pieces:
            rows = slice(start, start + size)
            targets = batch.targets[rows].to(self.device)
            documents = batch.documents[rows] if c.mask_documents else None
            # The start token after a document's last one stays a target: it says where to end.
            if documents is not None:
                documents = documents.to(self.device)
            with self._autocast():
                losses = self.model.losses(
                    batch.tokens[rows].to(self.device),
                    targets,
                    num_loops=loops[rows] if per_sequence else int(loops[start]),
                    backprop_loops=c.backprop_loops,
                    documents=documents,
                    collect_loops=c.loss.collect_loops,
                )
                parts = training_loss(losses, c.loss, self.model.config)
            reduce_gradients(self.model, on=start == pieces[-1])
            torch.autograd.backward(parts.total / len(pieces))
            with torch.no_grad():
                for name, stats in losses.router.items():
                    detached = RouterStats(*(x.detach() for x in stats))
                    router[name] = detached.plus(router.get(name))
                values = [part.detach() / len(pieces) for part in parts]
                sums = (
                    values if sums is None else [a + b for a, b in zip(sums, values, strict=True)]
                )
        assert sums is not None
        return LossParts(*sums), router

    def _autocast(self) -> AbstractContextManager[object]:
        if self.config.precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return nullcontext()

    def _max_decay(self) -> float:
        injection = self.model.recurrent.injection
        if not isinstance(injection, LTIInjection):
            return float("nan")
        with torch.no_grad():
            return float(whole(injection.discretize()[0].max()))
