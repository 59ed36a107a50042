"""The parts by themselves, each beside what torch offers for it; writes
results/bench/KIND/probes.json, for the kind of processor. No bf16 where that is emulated.

    python benchmarks/probes.py

One thread, forward + backward; median of 15 rounds in which the candidates take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from host import command_line, processor_kind
from rich.console import Console
from rich.table import Table
from torch import Tensor

from openmythos.files import write_json
from openmythos.kernels import few_keys
from openmythos.kernels.attention import blockwise_attention
from openmythos.kernels.cross_entropy import linear_cross_entropy
from openmythos.machine import bf16_is_native, describe

OUT = Console(highlight=False, markup=False)
ROUNDS = 15


def alternate(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each function, called in turns."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if turn:
                taken[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(times) for name, times in taken.items()}


def attention(dtype: torch.dtype, batch: int, seq: int, key_dim: int, value_dim: int) -> Any:
    def draw(dim: int) -> Tensor:
        x = torch.randn(batch, seq, 8, dim).transpose(1, 2).to(dtype)
        return x.detach().requires_grad_()

    query, key, value = draw(key_dim), draw(key_dim), draw(value_dim)
    scale, grad = key_dim**-0.5, torch.randn(batch, 8, seq, value_dim).to(dtype)

    def torchs() -> Tensor:
        wide = F.pad(value, (0, key_dim - value_dim))
        out = F.scaled_dot_product_attention(query, key, wide, is_causal=True, scale=scale)
        return out[..., :value_dim]

    def blocks() -> Tensor:
        return blockwise_attention(query, key, value, None, 0, scale)

    def both_ways(run: Callable[[], Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(run(), (query, key, value), grad)

    def own() -> Tensor:
        return few_keys.attention(query, key, value, None, is_causal=True, scale=scale)

    runs = {"torch": torchs, "blocks": blocks}
    if few_keys.accepts(query, key, value):
        runs["native"] = own
    return alternate({name: both_ways(run) for name, run in runs.items()})


def cross_entropy(dtype: torch.dtype, tokens: int, dim: int, vocab: int) -> Any:
    hidden = torch.randn(1, tokens, dim).to(dtype).requires_grad_()
    weight = (0.05 * torch.randn(vocab, dim)).to(dtype).requires_grad_()
    targets = torch.randint(vocab, (1, tokens))

    def full() -> Tensor:
        return F.cross_entropy(F.linear(hidden[0], weight).float(), targets[0])

    def chunked() -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(hidden[0], weight, targets[0], options=options)

    runs = {"full logits": full, "ours": lambda: linear_cross_entropy(hidden, weight, targets)}
    if hasattr(F, "linear_cross_entropy"):
        runs["torch, chunked"] = chunked
    return alternate(
        {
            name: (lambda run=run: torch.autograd.grad(run(), (hidden, weight)))
            for name, run in runs.items()
        }
    )


def new_shapes() -> Any:
    """Milliseconds of a bf16 product with a new number of rows, and with one used before."""
    weight = torch.randn(256, 256).bfloat16()
    found = {}
    for name in ("new shape", "seen before"):
        started = time.perf_counter()
        for rows in range(300, 400):
            torch.zeros(rows, 256, dtype=torch.bfloat16) @ weight
        found[name] = 1e3 * (time.perf_counter() - started) / 100
    return found


def gather() -> Any:
    x, rows = torch.randn(2048, 256), torch.randint(2048, (4096,))
    return alternate({"x[rows]": lambda: x[rows], "index_select": lambda: x.index_select(0, rows)})


def two_maps(first: int, second: int) -> Any:
    """A hundred times, for one row of 256 numbers: two linear maps, or one and its parts."""
    x, a, b = torch.randn(1, 256), torch.randn(first, 256), torch.randn(second, 256)
    both = torch.cat((a, b))

    @torch.inference_mode()
    def often(run: Callable[[], object]) -> None:
        for _ in range(100):
            run()

    return alternate(
        {
            "two maps": lambda: often(lambda: (F.linear(x, a), F.linear(x, b))),
            "one, split": lambda: often(lambda: F.linear(x, both).split((first, second), dim=-1)),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/bench") / processor_kind())
    options = parser.parse_args()
    torch.set_num_threads(1)
    machine = describe()
    found: dict[str, dict[str, float]] = {"4096 rows of 256 numbers": gather()}
    found["100 times one row to 128 and 80 numbers"] = two_maps(128, 80)
    found["100 times one row to 16 and 512 numbers"] = two_maps(16, 512)
    dtypes = {"fp32": torch.float32}
    if bf16_is_native():
        found["bf16 product of ~350 x 256 x 256"] = new_shapes()
        dtypes["bf16"] = torch.bfloat16
    for name, dtype in dtypes.items():
        for batch, seq, key_dim, value_dim in (
            (32, 21, 16, 16),
            (8, 128, 24, 24),
            (8, 256, 48, 32),
            (2, 512, 96, 64),
            (1, 2048, 96, 64),
        ):
            label = f"attention {name}, {batch} x {seq} tokens, {key_dim}/{value_dim}"
            found[label] = attention(dtype, batch, seq, key_dim, value_dim)
        for tokens, dim, vocab in ((2048, 256, 4096), (1024, 512, 4096), (1024, 256, 32_768)):
            label = f"cross-entropy {name}, {tokens} x {dim} x {vocab}"
            found[label] = cross_entropy(dtype, tokens, dim, vocab)
    table = Table("forward + backward", "milliseconds")
    for label, times in found.items():
        table.add_row(label, ", ".join(f"{name} {ms:.2f}" for name, ms in times.items()))
    OUT.print(table)
    options.out.mkdir(parents=True, exist_ok=True)
    write_json(
        {
            "command": command_line(),
            "hardware": machine,
            "milliseconds": found,
        },
        options.out / "probes.json",
    )


if __name__ == "__main__":
    main()
