"""Run folders: from a config to tokens, tokenizer, checkpoints and metrics on disk, and back.

RUN/
    config.toml                 the complete config of the run
    tokenizer.json              runs on text only, like tokens/
    tokens/{train,held_out}/    memory-mapped shards; or
    tokens/prepared.json        paths and sha256 of prepared folders that are read instead
    metrics.jsonl               one object per logged step
    state.json                  what the run is doing, see `train.state`
    .lock                       held by the process that trains
    machine.json                dtypes and hardware, see `train.precision`
    checkpoints/step-*/         see `train.checkpoint`
"""

import functools
import logging
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from openmythos.config import ConfigError, require, to_dict
from openmythos.data.corpus import Corpus
from openmythos.data.loader import BatchSource, Loader
from openmythos.data.prepared import References
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.tokenizer import Tokenizer, TokenizerFile, load_tokenizer
from openmythos.distributed.ranks import launched_here, rank_and_world_size, wait_for_files
from openmythos.files import save_toml
from openmythos.machine import Precision, choose_device, choose_precision, slow_precision
from openmythos.model.mythos import OpenMythos
from openmythos.train import checkpoint, precision
from openmythos.train.config import RunConfig, TaskData, TextData
from openmythos.train.folder import CONFIG_FILE, new_folder, read_config, require_free
from openmythos.train.metrics import MetricsLog
from openmythos.train.state import StateFile, lock
from openmythos.train.task_source import TaskSource, fitted
from openmythos.train.trackers import Trackers, require_packages
from openmythos.train.trainer import StepMetrics, Trainer

Progress = Callable[[str, int], None]
Track = Callable[[Mapping[str, Any]], None]
LOG = logging.getLogger(__name__)


def open_data(config: TextData) -> Corpus:
    """The corpus that a config names."""
    return Corpus(
        config.paths,
        field=config.field,
        held_out=config.held_out,
        limit_bytes=round(config.limit_mb * 1e6),
        skip_bad_rows=config.skip_bad_rows,
    )


@dataclass(frozen=True)
class Run:
    """An open run folder."""

    folder: Path
    config: RunConfig
    text_tokenizer: Tokenizer | None  # None: the run learns a task

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises a ConfigError for a run that learns a task."""
        if self.text_tokenizer is None:
            raise ConfigError(f"{self.folder}: was trained on a task, not on text")
        return self.text_tokenizer

    @property
    def text(self) -> TextData:
        """Where the text comes from; raises a ConfigError for a run that learns a task."""
        if not isinstance(self.config.data, TextData):
            raise ConfigError(f"{self.folder}: was trained on a task, not on text")
        return self.config.data

    @classmethod
    def create(cls, folder: Path, config: RunConfig, progress: Progress = lambda *_: None) -> "Run":
        """Make the folder, train or load the tokenizer, write the token shards.

        `progress` is called with the stage and the bytes of text done so far. A failure leaves
        nothing behind. A second process that creates the same folder gets a ConfigError.
        """
        require_free(folder)
        require_packages(config.train.trackers)
        choose_device(config.train.device, "train.device")
        with torch.device("meta"):
            OpenMythos(config.model)  # fail early if the model cannot be built
        with new_folder(folder) as unfinished:
            if isinstance(config.data, TextData):
                made = cls._with_text(unfinished, config, config.data, progress)
            else:
                made = cls(unfinished, fitted(config), None)
            # Refuses a corpus shorter than one window, and ranks that cannot share a batch.
            made.source(*rank_and_world_size())
            save_toml(made.config, unfinished / CONFIG_FILE)
        return replace(made, folder=folder)

    @classmethod
    def _with_text(cls, folder: Path, config: RunConfig, data: TextData, report: Progress) -> "Run":
        """Create a run on text: its tokenizer, and token shards of at least one window."""
        prepared = References.of(data.paths)
        data.require_honoured(prepared is not None)
        if prepared is None:
            corpus = open_data(data)
            report("tokenizer", 0)
            tokenizer = config.tokenizer.build(document.text for document in corpus.train())
        else:
            tokenizer = prepared.tokenizer()
            config = replace(config, tokenizer=TokenizerFile(path=prepared.sources[0].path))
        vocab_size = max(config.model.vocab_size, tokenizer.vocab_size)
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
        if prepared is None:
            for part, documents in (("train", corpus.train()), ("held_out", corpus.held_out())):
                progress = functools.partial(report, f"{part} tokens")
                write_shards(documents, tokenizer, folder / "tokens" / part, progress=progress)
        else:
            prepared.save(folder / "tokens")
            # Refuse damaged text here; several ranks verify it later, each a share of the files.
            prepared.shards("train", verify=rank_and_world_size()[1] == 1)
        tokenizer.save(folder)
        return cls(folder, config, tokenizer)

    @classmethod
    def open(cls, folder: Path) -> "Run":
        """Open an existing run folder."""
        config = read_config(folder)
        on_text = isinstance(config.data, TextData)
        return cls(folder, config, load_tokenizer(folder) if on_text else None)

    def shards(self, part: str, *, verify: bool = True) -> TokenShards:
        """Tokens of "train" or "held_out", verified against their checksums."""
        return TokenShards.join(self.sources(part, verify=verify))

    def sources(self, part: str, *, verify: bool = True) -> list[TokenShards]:
        """The same as a list: one entry, or one per prepared folder."""
        folder = self.folder / "tokens"
        prepared = References.load(folder)
        if prepared is None:
            found = [TokenShards.open(folder / part, verify=verify)]
        else:
            found = prepared.shards(part, verify=verify)
        for shards in found:
            shards.require_tokenizer(self.tokenizer)
        return found

    def source(
        self, rank: int = 0, world_size: int = 1, *, verify: tuple[int, int] | None = None
    ) -> BatchSource:
        """The batches of a rank. `verify` = (rank, ranks) first checks that share of the text."""
        config = self.config.train
        if isinstance(self.config.data, TaskData):
            return TaskSource(self.config, rank, world_size)
        sources = self.sources("train", verify=False)
        if verify is not None:
            for shards in sources:
                shards.verify(*verify)
        return Loader(
            sources,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            weights=self.text.weights,
        )

    def load_model(
        self, device: str | torch.device = "cpu", *, step: int | None = None
    ) -> OpenMythos:
        """The model of the checkpoint after `step` steps (None: the newest), in eval mode.

        `device` may be "auto".
        """
        return self.load_checkpoint(device, step=step)[0]

    def load_checkpoint(
        self, device: str | torch.device = "cpu", *, step: int | None = None
    ) -> tuple[OpenMythos, int]:
        """The same model and its number of steps."""
        chosen = checkpoint.checkpoint_at(self.folder, step)
        try:
            return checkpoint.load_model(chosen, device), checkpoint.step_of(chosen)
        except (ConfigError, OSError):
            # A process that trains the run may have replaced its newest checkpoint meanwhile.
            if step is not None or checkpoint.checkpoint_at(self.folder) == chosen:
                raise
        return self.load_checkpoint(device)

    def choose_precision(self, asked: str, device: torch.device) -> Precision:
        """The precision to use the model in; "auto" is fp32 if the run's config says fp32.

        Logs a warning if it is slow on the device.
        """
        by_name = self.config.train.precision == "fp32"
        chosen = choose_precision("fp32" if by_name and asked == "auto" else asked, device)
        slow = slow_precision(chosen, device)
        if slow is not None:
            LOG.warning(slow)
        return chosen


def train(
    run: Run,
    *,
    resume: bool = False,
    stopping: Callable[[], bool] | None = None,
    on_message: Callable[[str], None] = LOG.info,
) -> Generator[StepMetrics, None, None]:
    """Train, logging and saving as the config says; yields every step's metrics.

    All ranks call it. Training ends after a step at which `stopping` returned True on any rank; a
    single process abandons the step instead. Then, and when the iterator is closed, a checkpoint
    of the last finished step is saved.
    `resume` loads the newest checkpoint, if there is one, and then writes the run's config to its
    folder. A run that another process trains is refused with a ConfigError.
    `on_message` is called on rank 0 with lines about the precision and a missing checkpoint.
    """
    if rank_and_world_size()[0] > 0:
        return _steps(run, _trainer(run, resume, stopping, on_message), lambda _metrics: None)
    held = lock(run.folder)
    try:
        trainer = _trainer(run, resume, stopping, on_message)
        if resume and run.config != read_config(run.folder):
            save_toml(run.config, run.folder / CONFIG_FILE)
    except BaseException:
        held.release()
        raise
    return _watched(run, trainer, held)


def _trainer(
    run: Run, resume: bool, stopping: Callable[[], bool] | None, on_message: Callable[[str], None]
) -> Trainer:
    """A trainer that is ready for the next step of the run."""
    config = run.config.train
    rank, world_size = rank_and_world_size()
    if rank == 0:
        require_packages(config.trackers)
    # The ranks of each machine verify all files: it may have its own copy.
    source = run.source(rank, world_size, verify=launched_here())
    wait_for_files()
    found = checkpoint.list_checkpoints(run.folder) if resume else []
    if found:
        kind, trained = config.optimizer.kind, read_config(run.folder).train.optimizer.kind
        allowed = f"the run was trained with {trained}"
        require(kind == trained, "train.optimizer.kind", kind, allowed)
    with torch.device("meta"):
        model = OpenMythos(run.config.model)
    kept = precision.read(run.folder) if found else None
    trainer = Trainer(model, source, config, stopping, kept)
    if found:
        trainer.resume(checkpoint.load_training(found[-1], trainer.model, trainer.optimizers))
    if rank == 0:
        if resume and not found:
            on_message(f"{run.folder}: no checkpoint yet, training starts at step 0")
        on_message(precision.line(config.precision, trainer.dtypes, kept, trainer.device))
        precision.write(run.folder, trainer.dtypes, trainer.device)
    return trainer


def _watched(run: Run, trainer: Trainer, held: FileLock) -> Generator[StepMetrics, None, None]:
    """The steps of rank 0, which writes state.json and sends metrics to the trackers.

    Releases the lock at the end. A generator that is never started frees it as it is deleted.
    """
    config = run.config.train
    try:
        with (
            # Closed last: uploading what is left may take long, and by then all is saved.
            Trackers(config.trackers, run.folder, trainer.step, to_dict(run.config)) as trackers,
            StateFile(run.folder, step=trainer.step, num_steps=config.num_steps) as state,
            closing(_steps(run, trainer, trackers.log)) as steps,
        ):
            for metrics in steps:
                state.stepped(trainer.step)
                yield metrics
    finally:
        held.release()


def _steps(run: Run, trainer: Trainer, track: Track) -> Generator[StepMetrics, None, None]:
    config, record = run.config.train, _Record(run, trainer, track)
    try:
        for metrics in trainer.steps():
            record.log(metrics)
            if trainer.spiked:
                yield metrics
                record.roll_back()
                continue
            if trainer.step % config.save_every == 0 or trainer.step == config.num_steps:
                record.save()
            record.writer.check()
            yield metrics
            if trainer.stopping:
                break
        if trainer.stopping:
            record.save()
    except GeneratorExit:
        # The iterator was closed between two steps: the model is in a consistent state.
        record.save()
        raise
    finally:
        record.writer.close()


class _Record:
    """Writes metrics and checkpoints of a run."""

    def __init__(self, run: Run, trainer: Trainer, track: Track) -> None:
        config = run.config.train
        self.writer = checkpoint.CheckpointWriter(
            run.folder, keep=config.keep_checkpoints, keep_every=config.keep_every
        )
        self._run, self._trainer, self._saved = run, trainer, trainer.step
        self._track = track
        self._log = MetricsLog(run.folder, trainer.step) if trainer.rank == 0 else None

    def log(self, metrics: StepMetrics) -> None:
        if self._log is not None and self._trainer.logs(metrics.step):
            self._log.write(metrics.as_dict())
            self._track(metrics.as_dict())

    def save(self) -> None:
        trainer = self._trainer
        if self._saved != trainer.step and not trainer.spiked:
            self.writer.save(trainer.model, trainer.optimizers, trainer.counters)
            self._saved = trainer.step

    def roll_back(self) -> None:
        """Load the newest checkpoint, if there is one yet."""
        trainer = self._trainer
        self.writer.wait()
        if not checkpoint.list_checkpoints(self._run.folder):
            return
        newest = checkpoint.checkpoint_at(self._run.folder)
        trainer.roll_back(checkpoint.load_training(newest, trainer.model, trainer.optimizers))
        self._saved = trainer.step
        if self._log is not None:
            self._log.rewind(trainer.step)
