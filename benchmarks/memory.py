"""Memory and time of a training step of the preset small; writes results/scale/memory.*.

    python benchmarks/memory.py

By number of loops: backpropagation through all loops, truncated to the last four, and with
activation checkpointing. Also the chunked loss against full logits, and the estimate of `openmythos
plan` against measurement, on one process and on two ranks. Every case runs in its own process, on
one thread. Memory is the increase of resident memory, including weights and optimizer. malloc uses
mmap for every tensor, so that fragmentation does not count. Attention is torch's own kernel, which
needs as much memory as on an accelerator.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from host import peak_bytes

from openmythos import OpenMythos, kernels
from openmythos.analysis import plots, study_plots
from openmythos.distributed.parallelize import Parallel, parallelize
from openmythos.distributed.ranks import exit_process, process_group
from openmythos.files import write_json
from openmythos.machine import autocast, describe
from openmythos.model import presets
from openmythos.planning import cost, fit
from openmythos.train.optim import AdamW

BATCH, CONTEXT = 8, 256
LOOPS = (4, 16, 64)
MODES = ("all loops", "last 4 loops", "recomputed")
PLANNED = {
    "fp32": {"precision": "fp32", "num_loops": 4},
    "fp32, 16 loops": {"precision": "fp32", "num_loops": 16},
    "bf16": {"precision": "bf16", "num_loops": 4},
    "fp32, 4096 tokens": {"precision": "fp32", "num_loops": 4, "batch": 16},
}


def resident() -> int:
    """Resident bytes of this process; also resets its peak (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def step_of(case: Mapping[str, Any]) -> dict[str, float]:
    """MiB added and median seconds of training steps, run in this process."""
    torch.set_num_threads(1)
    kernels.CPU = replace(kernels.CPU, blocks=False)
    ranks = case.get("ranks", 1)
    before = resident()
    model = OpenMythos(presets.get("small"), seed=0).train()
    parallelize(
        model,
        Parallel(),
        device=torch.device("cpu"),
        checkpoint_loops=case.get("mode") == "recomputed",
        compiled=False,
    )
    optimizer = AdamW().build(model)
    batch = case.get("batch", BATCH)
    tokens = torch.randint(4096, (batch // ranks, CONTEXT))

    def step() -> None:
        with autocast(case["precision"], tokens.device):
            if case.get("logits") == "whole":
                logits = model(tokens, num_loops=case["num_loops"]).logits
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
            else:
                backprop_loops = 4 if case.get("mode") == "last 4 loops" else 0
                loss = model.losses(
                    tokens, tokens, num_loops=case["num_loops"], backprop_loops=backprop_loops
                ).cross_entropy
        loss.backward()
        optimizer.step(1.0)
        model.zero_grad(set_to_none=True)

    step()
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    found = {"mib": (peak_bytes() - before) / 2**20, "seconds": statistics.median(seconds)}
    return found


def in_a_process(case: Mapping[str, Any]) -> dict[str, float]:
    """Run `step_of` in new processes, one per rank; returns the maximum over ranks."""
    ranks = case.get("ranks", 1)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    environment["MALLOC_MMAP_THRESHOLD_"] = str(1 << 16)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    children = [
        subprocess.Popen(
            [sys.executable, __file__, "--case", json.dumps(case)],
            env=environment | {"RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    found = [json.loads(child.communicate()[0]) for child in children]
    return {name: max(each[name] for each in found) for name in found[0]}


def planned(case: Mapping[str, Any]) -> float:
    """MiB that `cost.training_memory` estimates, with its sharded parts divided by the ranks."""
    dtype = torch.bfloat16 if case["precision"] == "bf16" else torch.float32
    ranks, batch = case.get("ranks", 1), case.get("batch", BATCH)
    config = presets.get("small")
    whole = cost.training_memory(
        config, batch=batch // ranks, context=CONTEXT, num_loops=case["num_loops"], dtype=dtype
    )
    if ranks == 1:
        return whole.total / 2**20
    settings = fit.Settings(
        gpus=ranks, batch=batch // ranks, micro_batch=batch // ranks, checkpoint_loops=False
    )
    sharded = fit.device_memory(config, settings, CONTEXT, case["num_loops"])
    # The measurement is in fp32: gathered weights and activations take twice the bytes.
    wide = replace(
        sharded,
        gathered=2 * sharded.gathered,
        activations=whole.activations,
        logits=whole.logits,
    )
    return wide.total / 2**20


def draw(by_loops: Mapping[str, Mapping[int, Mapping[str, float]]], path: Path) -> None:
    """Draw memory and time against loops, a line per mode."""
    panels = {
        title: {mode: {n: [p[key]] for n, p in points.items()} for mode, points in by_loops.items()}
        for title, key in (("memory", "mib"), ("time", "seconds"))
    }
    rows = [
        {"mode": mode, "loops": n, **point}
        for mode, points in by_loops.items()
        for n, point in points.items()
    ]
    figure = study_plots.line_panels(
        panels, x_labels=["num_loops"], y_labels=["MiB of training", "seconds per step"], log_x=True
    )
    plots.save_figure(figure, path, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="")
    parser.add_argument("--out", type=Path, default=Path("results/scale"))
    options = parser.parse_args()
    if options.case:
        with process_group(torch.device("cpu")):
            found = step_of(json.loads(options.case))
        print(json.dumps(found), flush=True)
        exit_process(0)
    torch.set_num_threads(1)
    machine = describe()
    by_loops = {
        mode: {n: in_a_process({"precision": "fp32", "num_loops": n, "mode": mode}) for n in LOOPS}
        for mode in MODES
    }
    head = {
        logits: in_a_process({"precision": "fp32", "num_loops": 1, "batch": 32, "logits": logits})
        for logits in ("whole", "by chunks")
    }
    cases = PLANNED | {"fp32, two ranks": PLANNED["fp32"] | {"ranks": 2}}
    plans = {}
    for name, case in cases.items():
        measured, said = in_a_process(case)["mib"], planned(case)
        plans[name] = {"measured_mib": measured, "planned_mib": said, "ratio": said / measured}
        print(name, plans[name], flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    shape = {"preset": "small", "batch": BATCH, "context": CONTEXT, "head_batch": 32}
    write_json(
        {"machine": machine, **shape, "by_loops": by_loops, "head": head, "plan": plans},
        options.out / "memory.json",
    )
    draw(by_loops, options.out / "memory.png")
    for mode, points in by_loops.items():
        print(mode, {n: {k: round(v, 2) for k, v in p.items()} for n, p in points.items()})
    print(head)


if __name__ == "__main__":
    main()
