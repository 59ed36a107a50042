"""Kill a training run at random moments, resume it each time, compare with one left alone.

    python benchmarks/kills.py --kills 25

Writes results/scale/kills.json. Most kills are SIGKILL, a third of these while a checkpoint is
being written; some are SIGTERM, and some limit the size of files (RLIMIT_FSIZE), as a full disk
does. The command is the one that users run. At the end, metrics and weights must be bit-identical
to those of the uninterrupted run.
"""

import argparse
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from openmythos.files import write_json
from openmythos.machine import describe
from openmythos.train.checkpoint import FOLDER, checkpoint_at, list_checkpoints
from openmythos.train.metrics import read_metrics
from openmythos.train.run import Run

WAYS = ("SIGKILL", "SIGKILL", "SIGKILL inside a checkpoint", "SIGTERM", "full disk")
NOT_COMPARED = {"tokens_per_second", "mfu"}
SETTINGS = ("train.save_every=7", "train.seq_len=32", "model.context=32", "model.dim=32")


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "openmythos", *argv]


def quietly(*argv: str) -> int:
    return subprocess.run(command(*argv), stdout=subprocess.DEVNULL).returncode


def steps_done(run: Path) -> int:
    return len((run / "metrics.jsonl").read_bytes().splitlines())


def kill_once(run: Path, argv: list[str], way: str, delay: float) -> dict[str, Any]:
    """Start a command, stop it after `delay` seconds of training; returns what was left."""
    before = steps_done(run) if (run / "metrics.jsonl").is_file() else 0
    kept = {path.name for path in list_checkpoints(run)}
    child = subprocess.Popen(
        command(*argv), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    # On resuming, the log is first rewritten without the steps after the checkpoint.
    while child.poll() is None and not trains(run, before, kept):
        time.sleep(0.005)
    time.sleep(delay)
    if way == "SIGKILL inside a checkpoint":
        while child.poll() is None and not being_written(run):
            time.sleep(0.0005)
    if way == "full disk":
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (4096, 4096))
    else:
        child.send_signal(signal.Signals[way.split()[0]])
    error = child.communicate()[1].strip().splitlines()
    return {
        "way": way,
        "seconds_of_training": round(delay, 3),
        "exit_code": child.returncode,
        "error": error[-1] if error and way == "full disk" else "",
        "logged_steps": steps_done(run),
        "newest_checkpoint": checkpoint_at(run).name if list_checkpoints(run) else "",
        "during_a_checkpoint": being_written(run),
    }


def being_written(run: Path) -> bool:
    """Whether there is an incomplete checkpoint."""
    return any((run / FOLDER).glob(".step-*.tmp"))


def trains(run: Path, before: int, kept: set[str]) -> bool:
    """Whether training has started: the log has changed, or there is a new checkpoint."""
    if not (run / "metrics.jsonl").is_file():
        return False
    now = steps_done(run)
    return now not in (0, before) or bool({path.name for path in list_checkpoints(run)} - kept)


def compare(alone: Path, killed: Path) -> dict[str, Any]:
    """Count steps and tensors, and how many of them differ between the two runs."""
    wanted, found = (
        [{k: v for k, v in m.items() if k not in NOT_COMPARED} for m in read_metrics(run)]
        for run in (alone, killed)
    )
    weights, others = (Run.open(run).load_model().state_dict() for run in (alone, killed))
    return {
        "steps": len(wanted),
        "steps_that_differ": abs(len(wanted) - len(found))
        + sum(repr(a) != repr(b) for a, b in zip(wanted, found, strict=False)),
        "tensors": len(weights),
        "tensors_that_differ": sum(not torch.equal(x, others[name]) for name, x in weights.items()),
    }


def measure(folder: Path, kills: int, num_steps: int, seed: int) -> dict[str, Any]:
    """Kill and resume one run `kills` times, then compare; see the top of this file."""
    chance = random.Random(seed)
    text = folder / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(2000)))
    settings = ("--set", *SETTINGS, f"train.num_steps={num_steps}")
    new = ["train", "--recipe", "tiny", "--data", str(text)]
    alone, killed = folder / "alone", folder / "killed"
    assert quietly(*new, "--out", str(alone), *settings) == 0
    points = []
    argv = [*new, "--out", str(killed), *settings]
    for number in range(kills):
        point = kill_once(killed, argv, WAYS[number % len(WAYS)], chance.uniform(0.0, 1.2))
        points.append(point)
        print(f"{number + 1}/{kills}: {point}", flush=True)
        if list_checkpoints(killed):
            argv = ["train", "--resume", str(killed)]
        else:
            shutil.rmtree(killed)
    finished = point["exit_code"] == 0 and point["logged_steps"] == num_steps
    assert finished or quietly(*argv) == 0
    return {"kills": points, "compared": compare(alone, killed)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--num-steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("results/scale"))
    options = parser.parse_args()
    machine = describe()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.kills, options.num_steps, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json({"machine": machine, "seed": options.seed, **found}, options.out / "kills.json")
    print(found["compared"])


if __name__ == "__main__":
    main()
