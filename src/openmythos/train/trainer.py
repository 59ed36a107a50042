"""The training loop.

A step is a function of (config, seed, step) and the state before it: data, loops and noise are
drawn from (seed, step), so a resumed run goes on exactly as the uninterrupted one.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from openmythos.config import require
from openmythos.data.loader import Batch, BatchSource
from openmythos.distributed import ranks
from openmythos.distributed.parallelize import clip_gradients, parallelize, reduce_gradients
from openmythos.machine import autocast, bf16_is_native, choose_device, matmul_peak, seed_device
from openmythos.model.latents import positions
from openmythos.model.mythos import OpenMythos
from openmythos.nn.moe import RouterStats
from openmythos.planning.cost import Flops
from openmythos.recurrence.loop_sampling import sample_loops
from openmythos.train.checkpoint import Counters
from openmythos.train.config import TiedLoops, TrainConfig
from openmythos.train.loss import LossParts, training_loss
from openmythos.train.precision import Dtypes, choose
from openmythos.types import LoopCounts, NextLogits, TokenIds


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
    flops: float  # forward and backward, of all ranks
    balance: float
    max_violation: float  # of the busiest expert, over recurrent MoE layers
    ponder_cost: float
    max_decay: float
    skipped: int  # steps so far whose loss or gradient was not finite: nothing was changed
    rollbacks: int  # so far, after a spike of the loss
    mfu: float  # FLOPs per second as a share of those of matrix products in the same dtype
    # By loop, means over the positions that run it; empty at steps that are not logged.
    state_rms: tuple[float, ...]
    residual: tuple[float, ...]  # |h' - h| / |h'|
    data: Mapping[str, float]  # metrics of the source, such as the hops reached

    def as_dict(self) -> dict[str, Any]:
        """The fields as in metrics.jsonl: tuples as lists, `data` merged in."""
        found = asdict(self)
        found |= found.pop("data")
        return {key: list(x) if isinstance(x, tuple) else x for key, x in found.items()}


class StepAbandoned(Exception):  # noqa: N818 - no error: training was asked to stop
    """A step was left before it changed anything."""


class Trainer:
    """Trains a model on the batches of a source, from step `step` on.

    A model on the meta device is initialised here, sharded, on `config.device`. Training ends after
    a step at which `stopping` returned True on any rank; a single process calls it after every
    module and abandons the step. `kept` are the dtypes that a resumed run began with.
    """

    def __init__(
        self,
        model: OpenMythos,
        source: BatchSource,
        config: TrainConfig,
        stopping: Callable[[], bool] | None = None,
        kept: Dtypes | None = None,
    ) -> None:
        self.source, self.config = source, config
        self.rank, self.world_size = ranks.rank_and_world_size()
        config.loss.check(model.config)
        # The coda runs after every loop: with unequal loops its all-gathers would not match.
        fits = self.world_size == 1 or not config.loss.collect_loops or config.loops.per == "batch"
        require(fits, "loss.kind", config.loss.kind, 'wants loops.per = "batch" on several ranks')
        self.device = next(model.parameters()).device
        if self.device.type == "meta":
            self.device = choose_device(config.device, "train.device")
        self.dtypes = choose(config.precision, self.device, kept)
        config.require_gather(self.dtypes.model)
        self.model = parallelize(
            model,
            config.parallel,
            device=self.device,
            seed=config.seed,
            checkpoint_loops=config.checkpoint_loops,
            compiled=config.compile,
        )
        self.optimizers = config.optimizer.build(self.model, self.dtypes.muon_dtype)
        vocab_size, allowed = model.config.vocab_size, f"the data need {source.vocab_size}"
        require(source.vocab_size <= vocab_size, "model.vocab_size", vocab_size, allowed)
        self.counters = Counters()
        self.stopping = False  # whether any rank was asked to stop, as of the last step
        self.spiked = False  # whether the last step's loss was a spike
        self._asked_to_stop = stopping or (lambda: False)
        self._interruptible = stopping is not None and self.world_size == 1
        self._changing = False  # weights have changed in this step: it cannot be abandoned
        self._flops = Flops(model.config, source.seq_len)
        self._peak = 0.0  # FLOPs per second of this rank, measured after the first step

    @property
    def step(self) -> int:
        """Number of the next step."""
        return self.counters.step

    def steps(self) -> Iterator[StepMetrics]:
        """Run the remaining steps, yielding after each; stop iterating to stop training."""
        hooks = self._stop_hooks() if self._interruptible else []
        try:
            while self.step < self.config.num_steps:
                metrics = self.run_step()
                self._count(metrics)
                yield metrics
        except StepAbandoned:
            self.model.zero_grad(set_to_none=True)
            self.stopping = True
        finally:
            for hook in hooks:
                hook.remove()

    def resume(self, saved: Counters) -> None:
        """Continue from a checkpoint; its weights and optimizer state have been loaded."""
        self.counters = saved
        self.source.load(saved.source)

    def roll_back(self, saved: Counters) -> None:
        """Continue from an earlier checkpoint, with the batches that follow the spike."""
        now = self.counters
        passed = now.passed + now.step - saved.step
        self.resume(replace(saved, rollbacks=now.rollbacks + 1, passed=passed))
        self.spiked = False

    def run_step(self) -> StepMetrics:
        started = time.perf_counter()
        c = self.config
        # Noise of the initial state; nothing else in a step draws from the global generator.
        seed_device(((c.seed * 1_000_003 + self.step) * 1_009 + self.rank) % 2**63, self.device)
        place = self.step + self.counters.passed
        if self.source.restarts(place):
            self.optimizers = c.optimizer.build(self.model, self.dtypes.muon_dtype)
        batch, all_loops = self.source.batch(place), self._loops(place)
        rows = len(batch.tokens)
        loops = all_loops[self.rank * rows : (self.rank + 1) * rows]
        if not self.model.training:
            self.model.train()
        self.model.recurrent.record_norms = self.logs(self.step)
        parts, router, sizes = self._backward(batch, loops)
        stop = torch.tensor(float(self._asked_to_stop()), device=parts.total.device)
        *means, stop = ranks.mean_over_ranks([*parts, stop])
        parts, self.stopping = LossParts(*means), bool(stop > 0)
        scale = c.schedule.scale(self.step, c.num_steps)
        norm, finite = self._update(parts, router, scale)
        state_rms, residual = self._by_loop(sizes, int(all_loops.max()))
        self.source.learned(place, lambda tokens: self._last_logits(tokens, loops))
        self._changing = False
        passes = positions(batch.latents, batch.tokens.shape[1])
        flops = passes * self._flops_per_token(all_loops)
        elapsed = time.perf_counter() - started
        violations = [float(stats.max_violation()) for stats in router.values()]
        return StepMetrics(
            step=self.step,
            loss=float(parts.cross_entropy),
            total_loss=float(parts.total),
            gradient_norm=float(norm),
            lr_scale=scale,
            mean_loops=float(all_loops.float().mean()),
            tokens=batch.tokens.numel() * self.world_size,
            tokens_per_second=batch.tokens.numel() * self.world_size / elapsed,
            flops=flops,
            balance=float(parts.balance),
            max_violation=max(violations, default=0.0),
            ponder_cost=float(parts.ponder_cost),
            max_decay=self._max_decay(),
            skipped=self.counters.skipped + (not finite),
            rollbacks=self.counters.rollbacks,
            mfu=self._mfu(flops / self.world_size / elapsed),
            state_rms=state_rms,
            residual=residual,
            data=self.source.metrics(),
        )

    def _update(
        self, parts: LossParts, router: Mapping[str, RouterStats], scale: float
    ) -> tuple[Tensor, bool]:
        """Step if loss and gradient are finite; returns (gradient norm, whether they are)."""
        norm = clip_gradients(self.model.parameters(), self.config.clip_norm)
        counts = {name: ranks.sum_over_ranks(stats.counts) for name, stats in router.items()}
        # Both are the same on all ranks, so that all skip the step or none.
        finite = bool(parts.total.isfinite() & norm.isfinite())
        self._changing = True
        if finite:
            self.optimizers.step(scale, self.step / self.config.num_steps)
            self.model.update_router_bias(counts, scale)
        self.model.zero_grad(set_to_none=True)
        return norm, finite

    def _loops(self, place: int) -> LoopCounts:
        """Number of loops of each row of the global batch."""
        c = self.config
        if isinstance(c.loops, TiedLoops):
            loops = self.source.loops(place)
            assert loops is not None
            return torch.full((c.batch_size,), loops)
        return sample_loops(
            c.loops,
            c.curriculum,
            batch=c.batch_size,
            seed=c.seed,
            step=self.step,
            num_steps=c.num_steps,
        )

    @torch.no_grad()
    def _last_logits(self, tokens: TokenIds, loops: LoopCounts) -> NextLogits:
        """Logits at the last position, with the loops that this rank's rows ran in the step."""
        self.model.eval()
        with autocast(self.dtypes.model, self.device):
            out = self.model(tokens.to(self.device), num_loops=self._as_one(loops), last_only=True)
        return out.logits[:, 0]

    def _as_one(self, loops: LoopCounts) -> LoopCounts | int:
        """A single int if all rows run equally many loops: the model then need not sort them."""
        return loops if self.config.loops.per == "sequence" else int(loops[0])

    def _stop_hooks(self) -> list[RemovableHandle]:
        """Hooks that raise StepAbandoned in the forward or backward pass of any module.

        They are on the model only while it trains.
        """

        def ask(*_: object) -> None:
            if not self._changing and self._asked_to_stop():
                raise StepAbandoned

        def ask_both_ways(_module: nn.Module, _inputs: object, output: object) -> None:
            ask()
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(ask)  # type: ignore[no-untyped-call]

        # In compiled layers the hooks would become part of the graph.
        compiled = self.config.compile
        modules = [self.model.recurrent.injection] if compiled else self.model.modules()
        return [module.register_forward_hook(ask_both_ways) for module in modules]

    def logs(self, step: int) -> bool:
        """Whether a step is logged."""
        return step % self.config.log_every == 0 or step + 1 == self.config.num_steps

    def _count(self, metrics: StepMetrics) -> None:
        c, spikes = self.counters, self.config.spikes
        known = c.rollbacks < spikes.at_most
        self.spiked = known and spikes.is_spike(c.recent, metrics.loss)
        recent = c.recent
        if spikes.window and not self.spiked and math.isfinite(metrics.loss):
            recent = (*recent, metrics.loss)[-spikes.window :]
        self.counters = replace(
            c, step=c.step + 1, skipped=metrics.skipped, recent=recent, source=self.source.state()
        )

    def _mfu(self, rate: float) -> float:
        """FLOPs per second of this rank as a share of the peak.

        The peak is the highest rate seen: of matrix products in the run's dtype,
        or of a step, if the processor was busy while the products were timed.
        """
        if self._peak == 0:
            # If bf16 is emulated, the parts of a step in fp32 are the fast ones.
            emulated = self.dtypes.model == "bf16" and not bf16_is_native(self.device)
            dtypes = [torch.float32] if self.dtypes.model == "fp32" or emulated else []
            dtypes += [torch.bfloat16] if self.dtypes.model == "bf16" else []
            self._peak = max(matmul_peak(self.device, dtype) for dtype in dtypes)
        self._peak = max(self._peak, rate)
        return rate / self._peak

    def _flops_per_token(self, loops: LoopCounts) -> float:
        """FLOPs per token, summed over rows with their own numbers of loops."""
        held, rows_of = self.config.backprop_loops, Counter(loops.tolist())
        return sum(rows * self._flops.training(n, held) for n, rows in rows_of.items())

    def _by_loop(
        self, sizes: list[Tensor], longest: int
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """(state_rms, residual) of all ranks and micro-batches."""
        if not self.model.recurrent.record_norms:
            return (), ()
        # Micro-batches differ in their loops; `longest` is the most of any, on any rank.
        padded = [F.pad(x, (0, 0, 0, longest - len(x))) for x in sizes]
        positions, squares, changes = ranks.sum_over_ranks(torch.stack(padded).sum(0)).unbind(1)
        rms, residual = (squares / positions).sqrt(), changes / positions
        return tuple(rms.tolist()), tuple(residual.tolist())

    def _backward(
        self, batch: Batch, loops: Tensor
    ) -> tuple[LossParts, dict[str, RouterStats], list[Tensor]]:
        """Accumulate the gradients of a step over its micro-batches.

        Returns the mean losses, the sums of the router statistics, and the norms of the states of
        each micro-batch if they are recorded.
        """
        c = self.config
        size = min(c.micro_size, len(batch.tokens))
        pieces = range(0, len(batch.tokens), size)
        router: dict[str, RouterStats] = {}
        sums: list[Tensor] | None = None
        sizes: list[Tensor] = []
        for start in pieces:
            rows = slice(start, start + size)
            targets = batch.targets[rows].to(self.device)
            # The start token after a document's last one stays a target: it says where to end.
            documents = batch.documents[rows].to(self.device) if c.mask_documents else None
            latents = None if batch.latents is None else batch.latents[rows].to(self.device)
            with autocast(self.dtypes.model, self.device):
                losses = self.model.losses(
                    batch.tokens[rows].to(self.device),
                    targets,
                    num_loops=self._as_one(loops[rows]),
                    backprop_loops=c.backprop_loops,
                    documents=documents,
                    latents=latents,
                    collect_loops=c.loss.collect_loops,
                    by_halting=c.loss.by_halting,
                )
                pondering = self.step >= c.ponder_from * c.num_steps
                parts = training_loss(losses, c.loss, self.model, pondering=pondering)
            reduce_gradients(self.model, on=start == pieces[-1])
            torch.autograd.backward(parts.total / len(pieces))
            if losses.recurrence.norms is not None:
                sizes.append(losses.recurrence.norms)
            with torch.no_grad():
                for name, stats in losses.router.items():
                    detached = RouterStats(*(x.detach() for x in stats))
                    router[name] = detached.plus(router.get(name))
                values = [part.detach() / len(pieces) for part in parts]
                sums = (
                    values if sums is None else [a + b for a, b in zip(sums, values, strict=True)]
                )
        assert sums is not None
        return LossParts(*sums), router, sizes

    def _max_decay(self) -> float:
        with torch.no_grad():
            decay = self.model.recurrent.injection.max_decay()
        return float("nan") if decay is None else float(ranks.full_tensor(decay))
