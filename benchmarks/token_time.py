"""Where the time of a decoded token goes: torch's operators beside the native kernel.

    python benchmarks/token_time.py                 (writes results/bench/KIND/token-time.*)

"before" decodes with torch's operators alone, "after" as `openmythos generate` does. A total is the
fastest of some calls without a profiler, by CPU time, before and after in turns. The profiler then
says how much of a call is spent inside products, attention, and native layers, at least; what is
left is Python and many small operators, of which the profiler would count too much, since it slows
them down. Where the profiled parts take longer than the total, they are scaled down to fit, and
nothing is left: `profiled_share` is then above 1, and the parts of that bar are not reliable.
"""

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contenders import WORKLOADS, Ours, Workload
from figures import time_bars
from host import command_line, emulate_avx2, processor_kind
from limits import PROMPT, bound_seconds, machine_limits
from torch.profiler import ProfilerActivity, profile, record_function

from openmythos import kernels
from openmythos.analysis import plots
from openmythos.files import write_json
from openmythos.kernels import few_rows_native
from openmythos.kernels.few_rows_native import PreparedLayer
from openmythos.machine import describe, keep_freed_memory

FORMS: dict[str, kernels.Forms] = {"before": "torch", "after": "auto"}
NATIVE, REST = "native layers", "small operators and Python"
# Operators of torch and of this project by what they do; the profiler's names.
PARTS = {
    "products with weights": ("aten::mm", "aten::addmm", "aten::addmm_"),
    "attention": (
        "aten::bmm",
        "aten::baddbmm",
        "aten::_softmax",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
    ),
    NATIVE: (NATIVE,),
}


def fastest(call: Callable[[], object], times: int) -> float:
    taken = []
    for _ in range(times):
        started = time.process_time()
        call()
        taken.append(time.process_time() - started)
    return min(taken)


def operators(call: Callable[[], object]) -> int:
    """How many of torch's operators a call starts; those that an operator starts do not count."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        call()
    return sum(e.name.startswith("aten::") and e.cpu_parent is None for e in seen.events() or [])


def parts_of(
    call: Callable[[], object], total: float, times: int = 20
) -> tuple[dict[str, float], float]:
    """Seconds of each part of a call that takes `total` seconds without the profiler.

    Also the share of the total that the profiled parts took: parts of more than 1 are scaled to 1.
    """
    found: dict[str, list[float]] = defaultdict(list)
    for _ in range(times):
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            call()
        parts = dict.fromkeys(PARTS, 0.0)
        for event in seen.key_averages():
            for part, names in PARTS.items():
                if event.key in names:
                    parts[part] += 1e-6 * event.self_cpu_time_total
        for part, seconds in parts.items():
            found[part].append(seconds)
    shortest = {part: min(times) for part, times in found.items()}
    # Profiled calls may have met a busier machine than the fastest one without the profiler.
    share = sum(shortest.values()) / total
    shortest = {part: seconds / max(1.0, share) for part, seconds in shortest.items()}
    return {**shortest, REST: total - sum(shortest.values())}, share


def mark_native_layers() -> None:
    """Let the profiler see native calls, of layers and of the head, as events of one name."""
    PreparedLayer.__call__ = _marked(PreparedLayer.__call__)  # type: ignore[method-assign]
    few_rows_native.linear = _marked(few_rows_native.linear)


def _marked(plain: Callable[..., Any]) -> Callable[..., Any]:
    if plain.__name__ == "marked":
        return plain

    def marked(*arguments: Any) -> Any:
        with record_function(NATIVE):
            return plain(*arguments)

    return marked


def measure(workload: Workload, rows: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Of a decoded token, before and after: parts in seconds, their share, number of operators."""
    generator = torch.Generator().manual_seed(0)  # rows choose different experts
    tokens = torch.randint(workload.vocab, (rows, PROMPT), generator=generator)
    model = Ours(workload, "fp32")
    model.model.eval()
    cache = torch.inference_mode()(model.prefill)(tokens, 2 * (5 * rounds + 26))
    decode = torch.inference_mode()(model.decode)

    def step() -> None:
        decode(cache, tokens[:, :1])

    totals = dict.fromkeys(FORMS, math.inf)
    for _ in range(rounds):
        for name, forms in FORMS.items():
            with kernels.use(forms):
                totals[name] = min(totals[name], fastest(step, 5))
    found: dict[str, dict[str, Any]] = {"parts": {}, "profiled_share": {}, "operators": {}}
    for name, forms in FORMS.items():
        with kernels.use(forms):
            found["operators"][name] = operators(step)
    mark_native_layers()
    for name, forms in FORMS.items():
        with kernels.use(forms):
            found["parts"][name], found["profiled_share"][name] = parts_of(step, totals[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("results/bench") / processor_kind())
    parser.add_argument("--emulate-avx2", action="store_true", help="use no AVX-512")
    options = parser.parse_args()
    if options.emulate_avx2:
        emulate_avx2()
    machine = describe()
    keep_freed_memory()
    torch.set_num_threads(1)
    limits = machine_limits(1, False, torch.device("cpu"))
    found: dict[str, Any] = {}
    for name in options.workload:
        for rows in options.rows:
            bounds = {
                reading: bound_seconds(
                    WORKLOADS[name], f"decode, batch {rows}", limits, "fp32", 4, reread=reread
                )
                for reading, reread in (("weights in cache", False), ("weights reread", True))
            }
            measured = measure(WORKLOADS[name], rows, options.rounds)
            found[f"{name}, {rows} row{'s' * (rows > 1)}"] = {"bounds": bounds, **measured}
            print(name, rows, bounds, measured)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "token-time.json"
    command = command_line()
    about = {"command": command, "hardware": machine, "limits": limits}
    write_json({**about, "seconds": found}, path)
    rows = [
        {"case": case, "when": when, "part": part, "milliseconds": 1e3 * seconds}
        for case, result in found.items()
        for when, parts in result["parts"].items()
        for part, seconds in parts.items()
    ]
    plots.save_figure(time_bars(found), path.with_suffix(".png"), rows)


if __name__ == "__main__":
    main()
