"""Checkpoints of a run: each is a complete folder or does not exist.

    RUN/checkpoints/step-00000200/
        config.json                 of the model
        training.json               step and counters
        shard-*.safetensors         weights and optimizer state, a file per rank that wrote
        checksums.json              sha256 of all these files, written last

Weights and optimizer state go through torch's distributed checkpoints, which any number of ranks
can read again. A checkpoint is written in the background, under a temporary name, and renamed when
it is complete, so that a crash or a full disk leaves the previous one intact.
"""

import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from openmythos import files
from openmythos.config import ConfigError, require
from openmythos.distributed.ranks import rank_and_world_size, wait_for_files
from openmythos.machine import choose_device
from openmythos.model import storage
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.train.optim import Optimizers

FOLDER = "checkpoints"
TRAINING_FILE, CHECKSUMS_FILE = "training.json", "checksums.json"
_MODEL, _OPTIMIZER = "model.", "optimizer."
# Other entries of the folder belong to the user and are not touched.
_NAME = re.compile(r"step-\d{8,}")
# Training in one process is intended.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable")


@dataclass(frozen=True, kw_only=True)
class Counters:
    """The state of a run besides its tensors, the content of training.json.

    `passed` is the number of batches that rollbacks skipped, `recent` the losses that a spike is
    compared with, `source` the state of the data (see `BatchSource.state`).
    """

    step: int = 0  # next step
    skipped: int = 0
    rollbacks: int = 0
    passed: int = 0
    recent: tuple[float, ...] = ()
    source: dict[str, Any] = field(default_factory=dict)


class CheckpointWriter:
    """Saves checkpoints of a run in the background, one at a time, and removes old ones.

    Keeps the newest `keep` and, with keep_every > 0, those whose step is a multiple of it.
    """

    def __init__(self, run: Path, *, keep: int, keep_every: int = 0) -> None:
        self._folder, self._keep, self._keep_every = run / FOLDER, keep, keep_every
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        # A separate process group: background collectives must not mix with those of training.
        self._group = dist.new_group(backend="gloo") if rank_and_world_size()[1] > 1 else None

    def save(self, model: OpenMythos, optimizers: Optimizers, counters: Counters) -> None:
        """Copy all tensors and return; the background writes. All ranks call it at one step."""
        self.wait()
        rank, world_size = rank_and_world_size()
        temporary = self._folder / f".step-{counters.step:08d}.tmp"
        if rank == 0:
            for left_over in self._folder.glob(".step-*.tmp"):
                shutil.rmtree(left_over)
            temporary.mkdir(parents=True)
        if world_size > 1:
            dist.barrier()
        aside = {name: x.to("cpu", copy=True) for name, x in _tensors(model, optimizers).items()}
        self._writing = self._pool.submit(self._write, aside, model.config, counters, temporary)

    def check(self) -> None:
        """Raise the error of the background write, if it has failed by now."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Return when the last checkpoint is complete; raises the error if it failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait and stop."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _write(
        self,
        tensors: dict[str, Tensor],
        config: MythosConfig,
        counters: Counters,
        temporary: Path,
    ) -> None:
        rank, world_size = rank_and_world_size()
        final = self._folder / f"step-{counters.step:08d}"
        try:
            writer = HuggingFaceStorageWriter(str(temporary), save_distributed=True)
            with _plain_errors():
                alone = world_size == 1
                save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)
            if rank:
                return
            storage.write_config(config, temporary / storage.CONFIG_FILE)
            files.save_json(counters, temporary / TRAINING_FILE)
            checksums = {path.name: files.sha256_of(path) for path in sorted(temporary.iterdir())}
            files.write_json(checksums, temporary / CHECKSUMS_FILE)
            files.sync_folder(temporary)
            files.remove(final)
            temporary.rename(final)
        except BaseException:
            if rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in list_checkpoints(self._folder.parent)[: -self._keep]:
            if self._keep_every == 0 or step_of(old) % self._keep_every:
                files.remove(old)


def list_checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints, oldest first; copies under other names do not count."""
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    try:
        found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
        return sorted((p for p in found if any(p.iterdir())), key=step_of)
    except PermissionError as error:
        raise ConfigError(f"{error.filename}: cannot be read: {error.strerror}") from error


def checkpoint_at(run: Path, step: int | None = None) -> Path:
    """The complete checkpoint after `step` steps; None: the newest."""
    found = {step_of(path): path for path in list_checkpoints(run)}
    if not found:
        raise ConfigError(f"{run}: holds no checkpoint yet; `openmythos train --resume` trains it")
    chosen = max(found) if step is None else step
    require(chosen in found, "step", chosen, f"must be one of {', '.join(map(str, found))}")
    return found[chosen]


def verify(checkpoint: Path, rank: int = 0, world_size: int = 1) -> None:
    """Raise a ConfigError that names the file unless every file has its checksum.

    Each rank reads its share of the files; the largest are one per rank that wrote. The error also
    names the newest older checkpoint that is complete, if there is one.
    """
    try:
        _verify(checkpoint, rank, world_size)
    except ConfigError as error:
        known = list_checkpoints(checkpoint.parents[1])
        older = [path for path in known if path.name < checkpoint.name]
        whole = next(filter(_is_whole, reversed(older)), None)
        way_out = f"; delete {checkpoint} to go on from {whole.name}" if whole else ""
        raise ConfigError(f"{error}{way_out}") from error


def _verify(checkpoint: Path, rank: int = 0, world_size: int = 1) -> None:
    checksums = files.read_json(checkpoint / CHECKSUMS_FILE)
    shards = [path.name for path in checkpoint.glob("*.safetensors")]
    for name in (storage.CONFIG_FILE, TRAINING_FILE, *shards):
        if name not in checksums:
            raise ConfigError(f"{checkpoint / CHECKSUMS_FILE}: is damaged, it has no {name}")
    for name in sorted(checksums)[rank::world_size]:
        sha256 = checksums[name]
        path = checkpoint / name
        if not path.is_file():
            raise ConfigError(f"{path}: is missing")
        if files.sha256_of(path) != sha256:
            raise ConfigError(f"{path}: is damaged, its sha256 is not that of {CHECKSUMS_FILE}")


def _is_whole(checkpoint: Path) -> bool:
    try:
        _verify(checkpoint)
    except (ConfigError, OSError):
        return False
    return True


def load_model(checkpoint: Path, device: str | torch.device = "cpu") -> OpenMythos:
    """The model of a checkpoint, in eval mode, on one device (see `machine.choose_device`)."""
    chosen = choose_device(device)
    verify(checkpoint)
    model = OpenMythos(storage.load_config(checkpoint))
    _read(checkpoint, {_MODEL + name: x for name, x in model.state_dict().items()})
    return model.to(chosen).eval()


def load_training(checkpoint: Path, model: OpenMythos, optimizers: Optimizers) -> Counters:
    """Fill model and optimizers, sharded or not, from a checkpoint."""
    rank, world_size = rank_and_world_size()
    verify(checkpoint, rank, world_size)
    wait_for_files()
    saved = HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    names = [name.removeprefix(_OPTIMIZER) for name in saved if name.startswith(_OPTIMIZER)]
    try:
        optimizers.allocate_state(names)
    except ConfigError as error:
        raise ConfigError(f"{checkpoint}: {error}") from error
    _read(checkpoint, _tensors(model, optimizers))
    return files.load_json(Counters, checkpoint / TRAINING_FILE)


def _tensors(model: OpenMythos, optimizers: Optimizers) -> dict[str, Tensor]:
    """Everything that is saved, by name; sharded tensors stay sharded."""
    found = {_MODEL + name: x.detach() for name, x in model.state_dict().items()}
    return found | {_OPTIMIZER + name: x for name, x in optimizers.tensors().items()}


def _read(checkpoint: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors in place."""
    try:
        with torch.no_grad(), _plain_errors():
            load(
                dict(into),
                storage_reader=HuggingFaceStorageReader(str(checkpoint)),
                no_dist=rank_and_world_size()[1] == 1,
            )
    except (RuntimeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(f"{checkpoint}: does not fit this model: {first_line}") from error


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Raise the original error instead of torch's wrapper, which is not an Exception."""
    try:
        yield
    except CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from error


def step_of(checkpoint: Path) -> int:
    """The number of steps before a checkpoint, from its name."""
    return int(checkpoint.name.removeprefix("step-"))
