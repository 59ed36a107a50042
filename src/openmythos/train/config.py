"""The config of a whole run: model, tokenizer, data, training."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from openmythos.config import ConfigError, require, require_int, require_number
from openmythos.data.tokenizer import Bytes, TokenizerChoice
from openmythos.distributed.parallelize import Parallel
from openmythos.model.config import MythosConfig
from openmythos.recurrence.loop_sampling import (
    LoopCurriculum,
    LoopSampling,
    NoCurriculum,
    PoissonLoops,
)
from openmythos.tasks import KHop, Solvable, Task, TaskBatch
from openmythos.tasks.reasoning import NoThoughts, PauseThoughts, Thoughts
from openmythos.train.guards import NoSpikes, Spikes
from openmythos.train.loss import FinalLoss, Loss
from openmythos.train.optim import WSD, AdamW, Optimizer, Schedule
from openmythos.train.trackers import Tracker

# Several times the largest batches known; a step of more would need hours and all memory.
MAX_STEP_TOKENS = 2**28


@dataclass(frozen=True, kw_only=True)
class TextData:
    """Where text comes from; see `data.corpus.Corpus` for what a path may be.

    `held_out` is the share of documents never trained on, `field` the text column of JSONL and
    parquet, `limit_mb` > 0 stops reading a corpus (a streamed one, say) after that many megabytes;
    with `skip_bad_rows` a row without text is left out and counted, else it is an error.
    Paths may instead all be prepared folders (`data.prepared`), where these settings are fixed.
    `weights`, one per folder, are their shares of the batches (none: proportional to tokens).
    """

    kind: Literal["text"] = "text"
    paths: tuple[str, ...] = ("stdlib",)
    field: str = "text"
    held_out: float = 0.04
    limit_mb: float = 0.0
    weights: tuple[float, ...] = ()
    skip_bad_rows: bool = False

    def __post_init__(self) -> None:
        require(len(self.paths) > 0, "paths", list(self.paths), "must name at least one source")
        require_number("limit_mb", self.limit_mb, at_least=0, at_most=1e12)
        fits = len(self.weights) in (0, len(self.paths))
        allowed = f"must be one for each of the {len(self.paths)} paths, or none"
        require(fits, "weights", list(self.weights), allowed)
        for weight in self.weights:
            require_number("weights", weight, above=0, below=float("inf"))

    def require_honoured(self, prepared: bool) -> None:
        """Raise a ConfigError if something is set that has no effect on paths of this kind."""
        if not prepared:
            allowed = "only prepared folders can be weighted, see `openmythos data prepare`"
            require(not self.weights, "data.weights", list(self.weights), allowed)
            return
        usual = TextData()
        for name in ("field", "held_out", "limit_mb", "skip_bad_rows"):
            value = getattr(self, name)
            allowed = "was decided when the folder was prepared; leave it as it is"
            require(value == getattr(usual, name), f"data.{name}", value, allowed)


@dataclass(frozen=True, kw_only=True)
class TaskData:
    """Problems of a task, sampled in every step, with a curriculum on the number of hops.

    A step draws hops uniformly from `min_hops` to the curriculum's reach, which starts at
    `first_hops` and grows by two, up to `max_hops`, whenever the running accuracy on the
    longest quarter of the problems passes `mastery` (first_hops = max_hops: no curriculum).
    `thoughts`: what stands between question and answer, for tasks that know the steps.
    """

    kind: Literal["task"] = "task"
    task: Task = field(default_factory=KHop)
    min_hops: int = 1
    max_hops: int = 20
    first_hops: int = 2
    mastery: float = 0.8
    thoughts: Thoughts = field(default_factory=NoThoughts)

    def __post_init__(self) -> None:
        for name in ("min_hops", "max_hops", "first_hops"):
            require_int(name, getattr(self, name), minimum=1)
        require_number("mastery", self.mastery, above=0, at_most=1)
        fits = self.min_hops <= self.first_hops <= self.max_hops
        allowed = f"must be from min_hops = {self.min_hops} to max_hops = {self.max_hops}"
        require(fits, "first_hops", self.first_hops, allowed)
        thoughts = self.thoughts
        if thoughts.kind != "none":
            solved = isinstance(self.task, Solvable)
            require(solved, "task.kind", self.task.kind, "has no steps; thoughts must be none")
            fits = self.first_hops == self.max_hops
            require(fits, "first_hops", self.first_hops, "must be max_hops with thoughts")
        if isinstance(thoughts, PauseThoughts):
            fits, allowed = thoughts.stage(1) >= self.max_hops, "leaves steps written at the end"
            require(fits, "thoughts.stage_share", thoughts.stage_share, allowed)

    @property
    def vocab_size(self) -> int:
        """That of the task; with thoughts also the blank."""
        return self.task.vocab_size + (self.thoughts.kind != "none")

    def problems(
        self, batch: int, hops: int, generator: torch.Generator, progress: float = 1.0
    ) -> TaskBatch:
        """Problems as they are learned after a share `progress` of the training."""
        if not isinstance(self.task, Solvable) or self.thoughts.kind == "none":
            return self.task.sample(batch, hops, generator)
        question, steps = self.task.solved(batch, hops, generator)
        stage = self.thoughts.stage(progress)
        return self.thoughts.written(question, steps, stage, self.task.vocab_size)


Data = TextData | TaskData


@dataclass(frozen=True, kw_only=True)
class TiedLoops:
    """As many loops as the problem has hops, plus a uniform random number from 0 to `extra`."""

    kind: Literal["tied"] = "tied"
    extra: int = 6
    per: ClassVar[Literal["batch"]] = "batch"

    def __post_init__(self) -> None:
        require_int("extra", self.extra, minimum=0)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train.

    A step uses batch_size sequences of seq_len tokens (a task sets its own seq_len), in
    micro-batches of micro_batch_size (0: all at once). Loops are sampled from `loops` under
    `curriculum`; "tied" loops, for tasks only, follow the hops. Only the last backprop_loops of
    each sequence carry gradient (0: all). The cost of halting joins the loss after a share of
    `ponder_from` of the steps. `mask_documents` keeps attention inside each packed
    document. precision "bf16" is autocast over fp32 weights; "auto" is bf16 where the device
    computes it natively, else fp32 (see `train.precision`). The newest keep_checkpoints are kept,
    and with keep_every > 0 those at its multiples. `trackers` receive the lines of metrics.jsonl.
    """

    num_steps: int = 200
    batch_size: int = 16
    micro_batch_size: int = 0
    seq_len: int = 256
    seed: int = 0
    loops: LoopSampling | TiedLoops = field(default_factory=PoissonLoops)
    curriculum: LoopCurriculum = field(default_factory=NoCurriculum)
    backprop_loops: int = 0
    loss: Loss = field(default_factory=FinalLoss)
    ponder_from: float = 0.0
    optimizer: Optimizer = field(default_factory=AdamW)
    schedule: Schedule = field(default_factory=WSD)
    clip_norm: float = 1.0
    spikes: Spikes = field(default_factory=NoSpikes)
    precision: Literal["bf16", "fp32", "auto"] = "auto"
    mask_documents: bool = False
    checkpoint_loops: bool = False
    compile: bool = False
    device: str = "auto"
    parallel: Parallel = field(default_factory=Parallel)
    log_every: int = 1
    save_every: int = 100
    keep_checkpoints: int = 2
    keep_every: int = 0
    trackers: tuple[Tracker, ...] = ()

    def __post_init__(self) -> None:
        for name in ("num_steps", "batch_size", "seq_len", "log_every", "save_every"):
            require_int(name, getattr(self, name), minimum=1)
        require_int("keep_checkpoints", self.keep_checkpoints, minimum=1)
        for name in ("micro_batch_size", "seed", "backprop_loops", "keep_every"):
            require_int(name, getattr(self, name), minimum=0)
        fits = self.batch_size * self.seq_len <= MAX_STEP_TOKENS
        allowed = f"times seq_len = {self.seq_len} must be at most {MAX_STEP_TOKENS} tokens a step"
        require(fits, "batch_size", self.batch_size, allowed)
        require(
            self.batch_size % self.micro_size == 0,
            "micro_batch_size",
            self.micro_batch_size,
            f"must divide batch_size = {self.batch_size}",
        )
        require_number("clip_norm", self.clip_norm, above=0)
        require_number("ponder_from", self.ponder_from, at_least=0, at_most=1)
        if self.precision != "auto":
            self.require_gather(self.precision)
        kinds = [tracker.kind for tracker in self.trackers]
        require(len(kinds) == len(set(kinds)), "trackers", kinds, "must be of different kinds")
        fits = self.parallel.experts == 1 or not self.compile
        allowed = "must be 1 with compile = true"
        require(fits, "parallel.experts", self.parallel.experts, allowed)

    def require_gather(self, precision: str) -> None:
        """Raise unless weights may be all-gathered in `parallel.gather` with that precision."""
        gather = self.parallel.gather
        allowed = f"must be fp32 with precision = {precision}"
        if self.precision == "auto":
            allowed += ", which auto is on this device"
        require(gather == "fp32" or precision == "bf16", "parallel.gather", gather, allowed)

    @property
    def micro_size(self) -> int:
        """Sequences per forward pass."""
        return self.micro_batch_size or self.batch_size


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The complete config of a run.

    The model's vocabulary follows the tokenizer or the task: `model.vocab_size` is raised to
    theirs if it is smaller. A task needs no tokenizer.
    """

    model: MythosConfig = field(default_factory=MythosConfig)
    tokenizer: TokenizerChoice = field(default_factory=Bytes)
    data: Data = field(default_factory=TextData)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        require(
            self.train.seq_len <= self.model.context,
            "train.seq_len",
            self.train.seq_len,
            f"must be at most model.context = {self.model.context}",
        )
        try:
            self.train.loss.check(self.model)
        except ConfigError as error:
            raise ConfigError(f"train.{error}") from error
        loops, curriculum = self.train.loops, self.train.curriculum
        if isinstance(loops, TiedLoops):
            allowed = "follows the hops of a task; of text choose another"
            require(isinstance(self.data, TaskData), "train.loops.kind", loops.kind, allowed)
            unchanged = isinstance(curriculum, NoCurriculum)
            allowed = "must be none with tied loops"
            require(unchanged, "train.curriculum.kind", curriculum.kind, allowed)
