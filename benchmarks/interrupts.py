"""Interrupt every long command at random moments: how long until its process has ended?

    python benchmarks/interrupts.py --times 10

Prints a line per signal and writes results/scale/interrupts.json. Every process must end within
2 s, whether it is importing, reading, training a tokenizer or in a training step. SIGINT and
SIGTERM alternate. The exit code must be that of the signal, and there must be no traceback.
"""

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from openmythos.files import write_json
from openmythos.machine import describe

LARGE = ("tokenizer.kind=bytes", "data.limit_mb=1", "train.batch_size=32")
# The signal is sent within this many seconds; the first seconds go to importing torch.
COMMANDS: dict[str, tuple[tuple[str, ...], float]] = {
    "demo, hops": (("demo", "--out", "{new}"), 25.0),
    "demo, text": (("demo", "--hops-steps", "0", "--out", "{new}"), 60.0),
    "train": (("train", "--recipe", "small", "--out", "{new}"), 60.0),
    # Little to read, so training starts soon; a step takes about ten seconds.
    "train, large steps": (
        ("train", "--recipe", "small", "--out", "{new}", "--set", *LARGE),
        60.0,
    ),
    "eval": (("eval", "{run}", "--data", "stdlib", "--out", "{new}"), 30.0),
    "generate": (
        ("generate", "{run}", "--max-new-tokens", "60", "--num-loops", "5000"),
        12.0,
    ),
    "study": (("study", "depth-extrapolation", "--out", "{new}"), 30.0),
    "tokenizer": (("tokenizer", "--vocab-size", "32000", "--out", "{new}"), 12.0),
    "data prepare": (
        ("data", "prepare", "--data", "stdlib", "--tokenizer", "{run}", "--out", "{new}"),
        8.0,
    ),
}
BAR = 2.0


def command(*argv: str) -> list[str]:
    return [sys.executable, "-m", "openmythos", *argv]


def interrupt(argv: list[str], delay: float, number: signal.Signals) -> dict[str, Any]:
    """Start a command, send it a signal after `delay` seconds and wait until it ends."""
    child = subprocess.Popen(
        command(*argv), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(delay)
    ended = child.poll() is not None
    started = time.perf_counter()
    child.send_signal(number)
    child.wait()
    seconds = time.perf_counter() - started
    assert child.stderr is not None
    error = child.stderr.read()
    return {
        "signal": number.name,
        "after": round(delay, 2),
        "seconds": round(seconds, 3),
        "exit_code": child.returncode,
        "traceback": "Traceback" in error,
        "error": error.strip().rpartition("\n")[2],
        "ended_before": ended,
    }


def measure(folder: Path, times: int, seed: int, only: str) -> dict[str, list[dict[str, Any]]]:
    chance = random.Random(seed)
    run = folder / "run"
    text = folder / "text.txt"
    text.write_text("".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(2000)))
    small = ("train.num_steps=2", "tokenizer.kind=bpe", "tokenizer.vocab_size=400")
    made = command("train", "--recipe", "tiny", "--data", str(text), "--out", str(run), "--set")
    subprocess.run([*made, *small], check=True, stdout=subprocess.DEVNULL)
    found: dict[str, list[dict[str, Any]]] = {}
    for name, (argv, span) in COMMANDS.items():
        if only not in name:
            continue
        for turn in range(times):
            new = str(folder / f"{name.split(',')[0].replace(' ', '-')}-{turn}-{len(found)}")
            filled = [part.format(run=run, new=new) for part in argv]
            number = (signal.SIGINT, signal.SIGTERM)[turn % 2]
            point = interrupt(filled, chance.uniform(0.2, span), number)
            found.setdefault(name, []).append(point)
            print(f"{name}: {point}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="commands whose name has this in it")
    parser.add_argument("--out", type=Path, default=Path("results/scale"))
    options = parser.parse_args()
    machine = describe()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder), options.times, options.seed, options.only)
    counted = [p for points in found.values() for p in points if not p["ended_before"]]
    slowest = max((point["seconds"] for point in counted), default=0.0)
    wrong = sum(p["exit_code"] not in (130, 143) or p["traceback"] for p in counted)
    print(f"slowest answer: {slowest:.2f} s of {len(counted)}; {wrong} left in another way")
    if not options.only:
        options.out.mkdir(parents=True, exist_ok=True)
        summary = {"bar": BAR, "slowest": slowest, "left_in_another_way": wrong}
        write_json(
            {"machine": machine, "seed": options.seed, **summary, "commands": found},
            options.out / "interrupts.json",
        )


if __name__ == "__main__":
    main()
