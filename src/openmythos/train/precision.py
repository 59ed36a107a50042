"""The dtypes that a run computes in: named in its config, or chosen for the machine."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from openmythos import machine
from openmythos.config import from_dict
from openmythos.distributed.ranks import rank_and_world_size
from openmythos.files import read_json, write_json
from openmythos.machine import Precision

FILE = "machine.json"


@dataclass(frozen=True, kw_only=True)
class Dtypes:
    """Precision of model and loss (autocast over fp32 weights), and of Muon's iteration."""

    model: Precision
    muon: Precision

    @property
    def muon_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.muon == "bf16" else torch.float32


def choose(asked: str, device: torch.device, kept: Dtypes | None = None) -> Dtypes:
    """The dtypes of a run, the same on all ranks: "auto" is bf16 only if every rank has it.

    `kept` are the dtypes of a resumed run. They are used again, on any machine, unless another
    precision is asked for by name. Muon computes in bf16 if the model does and bf16 is native.
    """
    if kept is not None and asked not in ("auto", kept.model):
        kept = None
    chosen = machine.choose_precision(asked, device)
    fast = chosen == "bf16" and machine.bf16_is_native(device)
    own = kept or Dtypes(model=chosen, muon="bf16" if fast else "fp32")
    rank, world_size = rank_and_world_size()
    if world_size == 1:
        return own
    flags = torch.tensor([own.model == "bf16", own.muon == "bf16"], device=device).int()
    agreed = flags.clone()
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    # Other machines may not see the run folder: all take what rank 0 has read.
    if rank == 0 and kept is not None:
        agreed = flags
    dist.broadcast(agreed, 0)
    model, muon = agreed.tolist()
    return Dtypes(model="bf16" if model else "fp32", muon="bf16" if muon else "fp32")


def line(asked: str, found: Dtypes, kept: Dtypes | None, device: torch.device) -> str:
    """A line for the user: the choice, or a warning if it is slow."""
    slow = machine.slow_precision(found.model, device)
    if slow is not None:
        return slow
    why = "" if asked != "auto" else ", as the run began" if kept else ", the fast one here"
    return f"precision: {found.model} on {device}{why}"


def read(run: Path) -> Dtypes | None:
    """The dtypes in RUN/machine.json; None if the file is missing."""
    path = run / FILE
    if not path.is_file():
        return None
    return from_dict(Dtypes, read_json(path).get("precision", {}), f"{path}: precision")


def write(run: Path, found: Dtypes, device: torch.device) -> None:
    """RUN/machine.json: the dtypes, and the machine of the process that trains."""
    here = {key: value for key, value in machine.describe().items() if key != "commit"}
    if device.type == "cuda":
        here["gpu"] = torch.cuda.get_device_name(device)
    write_json({"precision": asdict(found), "device": str(device), **here}, run / FILE)
