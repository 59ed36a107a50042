"""What results/bench and results/cache say, as tables for README.md and docs/performance.md."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import goals
import roster

# Of processors; all figures were measured on the first. The last emulates the one before.
KINDS = ("avx512-bf16", "avx2", "avx512-amx", "avx2-xeon")
SHAPES = {
    "S": "width 256, 16 experts top-2, 4 loops, 8 x 256 tokens",
    "M": "width 512, 64 experts top-4, 8 loops, 2 x 512 tokens",
}


def load(results: Path, name: str) -> Any:
    return json.loads((results / name).read_text(encoding="utf-8"))


def row(claim: str, measured: str, where: str) -> str:
    return f"| {claim} | {measured} | {where} |"


def kinds(results: Path, file: str) -> list[str]:
    """The kinds of processor for which results/bench has this file."""
    return [kind for kind in KINDS if (results / "bench" / kind / file).exists()]


def bench_runs(results: Path) -> dict[tuple[str, str], list[Any]]:
    """Results of `make bench` by (workload, kind of processor): one per number of threads."""
    return {
        (name, kind): load(results, f"bench/{kind}/bench-{name}.json")["results"]
        for name in "SM"
        for kind in kinds(results, f"bench-{name}.json")
    }


def kinds_table(results: Path) -> str:
    """Ratios to the reference on one thread, a column per workload and kind of processor."""
    runs = {key: found[0] for key, found in bench_runs(results).items()}
    heads = [f"{name}, {kind}" for name, kind in runs]
    lines = [f"| | | {' | '.join(heads)} |", "|---" * (len(runs) + 2) + "|"]
    for figure in next(iter(runs.values()))["ratio"]:
        for name in (*goals.FP32, *goals.WEIGHTS, *goals.BF16):
            ratios = [run["ratio"].get(figure, {}).get(name) for run in runs.values()]
            if not any(ratios):
                continue
            cells = ["" if ratio is None else f"{ratio:.2f}x" for ratio in ratios]
            lines.append(f"| {figure} | {name.removeprefix('openmythos-')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def bench_rows(results: Path) -> Iterator[str]:
    """Rows of speed-ups on one thread by kind of processor, workloads S and M, and cache bytes."""
    runs = {key: found[0] for key, found in bench_runs(results).items()}

    def ratio(figure: str, name: str) -> str:
        """Such as `avx512-bf16 1.30x; 1.22x, avx2 1.31x` (S; M); kinds without it are omitted."""
        by_kind: dict[str, list[str]] = {}
        for (_, kind), run in runs.items():
            if name in run["ratio"][figure]:
                by_kind.setdefault(kind, []).append(f"{run['ratio'][figure][name]:.2f}x")
        return ", ".join(f"{kind} {'; '.join(found)}" for kind, found in by_kind.items())

    fp32, compiled = "openmythos-fp32", "openmythos-compiled"
    bf16 = "openmythos-bf16"
    where = "`make bench` ([tables, processors](docs/performance.md))"
    yield row(
        "trains faster than open-mythos 0.5.0, equal shapes and loops, one CPU thread (S; M)",
        f"fp32: {ratio('training step', fp32)}. bf16 against its fp32: "
        f"{ratio('training step', bf16)}",
        where,
    )
    yield row(
        "reads prompts faster (8 of 512 tokens)",
        f"fp32: {ratio('prefill, batch 8', fp32)}. With bf16 weights: "
        f"{ratio('prefill, batch 8', bf16)}",
        "same",
    )
    for size, claim in ((1, "decodes one sequence faster"), (8, "decodes 8 sequences faster")):
        figure = f"decode, batch {size}"
        shown = {
            "": ratio(figure, fp32),
            "With bf16 weights: ": ratio(figure, "openmythos-bf16-weights"),
            "Without the native kernel: ": ratio(figure, "openmythos-torch"),
            "compiled: ": ratio(figure, compiled),
        }
        measured = ". ".join(what + found for what, found in shown.items() if found)
        yield row(claim, f"{measured} ([some goals missed](docs/performance.md))", "same")
    # Cache sizes are the same on every processor.
    held = [run["cache_bytes_per_token"] for (_, kind), run in runs.items() if kind == KINDS[0]]
    less = [one["open-mythos"] / one[fp32] for one in held]
    yield row(
        "a token of cache takes what the MLA formula says",
        f"{held[0][fp32]:.0f} and {held[1][fp32]:.0f} bytes (S, M, fp32), "
        f"{less[0]:.1f} and {less[1]:.1f} times less than open-mythos 0.5.0",
        "same",
    )


def scaling_rows(results: Path) -> Iterator[str]:
    path = f"bench/{kinds(results, 'scaling.json')[0]}/scaling.json"
    found = load(results, path)
    fit, memory = found["line_fits"]["forward"], found["training_mib_by_loops"]["last 4 loops"]
    where = f"`{found['command'].strip()}` ([results](results/{path}))"
    yield row(
        "a loop costs the same however many there are; the rest is prelude, coda and head",
        f"forward {1e3 * fit['fixed_seconds']:.1f} ms + {1e3 * fit['seconds_per_loop']:.1f} ms per "
        f"loop for 1 to 64 loops, within {fit['largest_relative_error']:.1%} "
        f"({1e3 * found['outside_the_loop_seconds']:.1f} ms without the loop); backpropagation "
        f"through the last 4 loops holds {memory['4']:.0f} MiB at 4 loops and {memory['64']:.0f} "
        "at 64",
        where,
    )
    (halted,) = found["loop_cost_by_halted_percent"].values()
    (exits,) = found["milliseconds_by_exit_loop"].values()
    yield row(
        "halting and early exit save time",
        f"a loop with 75% of positions halted costs {halted['75']:.0%} of a full one; a token that "
        f"leaves after 1 / 4 / 16 loops is decoded in {exits['1']:.1f} / {exits['4']:.1f} / "
        f"{exits['16']:.1f} ms",
        "same",
    )


def cache_rows(results: Path) -> Iterator[str]:
    found = load(results, "cache/cache.json")
    sizes, costs = found["bytes_per_token_at_16_loops"], found["added_by_policy"]
    exact, shared = ([size[key] for size in sizes] for key in ("exact_ratio", "shared_ratio"))
    block = min(size["recurrent_shared_ratio"] for size in sizes)
    priced = ", ".join(
        f"{name} {cost['added_nats_per_token']:+.3f} ± {cost['half_width_95']:.3f}"
        for name, cost in costs.items()
        if name != "exact"
    )
    yield row(
        "a looped cache is small: MLA against full keys and values of equal depth, presets 1b to "
        "1t at 16 loops",
        f"{min(exact):.0f} to {max(exact):.0f} times less; loops that share one slot "
        f"{min(shared):.1f} to {max(shared):.1f} times less again ({block:.0f} times in the "
        f"recurrent block: prelude and coda keep theirs); cost in nats per token, of a "
        f"model that hardly uses its loops: {priced}",
        f"`{found['command']}` ([results](results/cache/cache.json))",
    )


def shown_share(run: Any, share: float) -> str:
    """A fraction of the bound, or "?" if the bound was measured on a busy machine.

    No fraction can exceed 1: if one does, the measured limits of that run are too low.
    """
    shares = [x for figure in run["share_of_bound"].values() for x in figure.values()]
    return "?" if max(shares) > 1 else f"{share:.0%}"


def speed_tables(results: Path) -> str:
    """A table per workload, processor and number of threads, of all figures and contenders."""
    lines: list[str] = []
    found = bench_runs(results)
    for name, shape in SHAPES.items():
        every = [(kind, run) for kind in KINDS for run in found.get((name, kind), [])]
        for kind, run in every:
            names = [name for name in roster.CONTENDERS if name in run["cache_bytes_per_token"]]
            threads = f"{run['threads']} thread{'s' * (run['threads'] > 1)}"
            lines += [f"**{name}** ({shape}), {threads}, {kind}", ""]
            lines += ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
            for figure in run["seconds"]:
                cells = " | ".join(speed_cell(run, figure, name) for name in names)
                lines.append(f"| {figure} | {cells} |")
            held, peak = run["cache_bytes_per_token"], run.get("peak_megabytes")
            lines.append(
                "| cache, bytes per token | " + " | ".join(f"{held[n]:.0f}" for n in names) + " |"
            )
            if peak:
                cells = " | ".join(f"{peak[n]:.0f} MiB" if n in peak else "" for n in names)
                lines.append(f"| peak memory, training | {cells} |")
            lines.append("")
    return "\n".join(lines)


def speed_cell(run: Any, figure: str, name: str) -> str:
    """Milliseconds, ratio to the reference, share of the bound; of decoding, its two readings."""
    seconds = run["seconds"][figure].get(name)
    if seconds is None:
        return ""
    shares = [run["share_of_bound"][figure][name]]
    if figure in run.get("share_of_bound_reread", {}):
        shares.append(run["share_of_bound_reread"][figure][name])
    shown = " / ".join(shown_share(run, share) for share in shares)
    return f"{1e3 * seconds:.1f}, {run['ratio'][figure][name]:.2f}x, {shown}"


def gpu_tables(results: Path) -> str:
    """A table per GPU and workload: milliseconds, ratios to open-mythos in fp32 and in bf16."""
    lines: list[str] = []
    for path in sorted((results / "bench").glob("*/bench-?.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        for run in found["results"]:
            if run.get("device") != "cuda":
                continue
            names, w = list(run["cache_bytes_per_token"]), run["workload"]
            lines += [
                f"**{w['name']}** ({w['batch']} x {w['seq']} tokens in training), "
                f"{found['hardware']['gpu']}, fp32 products in {run['fp32_products'].upper()}",
                "",
                "| | " + " | ".join(names) + " |",
                "|---" * (len(names) + 1) + "|",
            ]
            for figure in run["seconds"]:
                cells = " | ".join(gpu_cell(run, figure, name) for name in names)
                lines.append(f"| {figure} | {cells} |")
            peak = run["peak_megabytes"]
            cells = " | ".join(f"{peak[n]:.0f} MiB" if n in peak else "" for n in names)
            lines += [f"| peak memory, training | {cells} |", ""]
    return "\n".join(lines or ["No GPU has been measured."])


def gpu_cell(run: Any, figure: str, name: str) -> str:
    """Milliseconds, ratio to the reference in fp32; of contenders in bf16, also to it in bf16."""
    seconds = run["seconds"][figure].get(name)
    if seconds is None:
        return "failed" if name in run["failed"].get(figure, {}) else ""
    ratios = [run[key].get(figure, {}).get(name) for key in ("ratio", "ratio_in_bf16")]
    shown = " / ".join(f"{ratio:.2f}x" for ratio in ratios if ratio is not None)
    return f"{1e3 * seconds:.2f}, {shown}" if shown else f"{1e3 * seconds:.2f}"


def floors_table(results: Path) -> str:
    """Goals of bench.py and the measured values; goals that were missed are in bold."""
    found = {
        (workload, kind): {check.goal: check for check in goals.checks(run, kind)}
        for (workload, kind), runs in bench_runs(results).items()
        for run in runs
        if run["threads"] == 1
    }
    heads = [f"{workload}, {kind}" for workload, kind in found]
    lines = [f"| goal | {' | '.join(heads)} |", "|---" * (len(found) + 1) + "|"]
    for goal in dict.fromkeys(goal for checks in found.values() for goal in checks):
        cells = []
        for checks in found.values():
            check = checks.get(goal)
            if check is None:
                cells.append("")
                continue
            value = check.shown(check.value) if check.met else f"**{check.shown(check.value)}**"
            cells.append(f"{value} ({'at most ' * check.at_most}{check.shown(check.bound)})")
        lines.append(f"| {goal} | {' | '.join(cells)} |")
    return "\n".join(lines)
