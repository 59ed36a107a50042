"""Ratios, tables, result files and the figure of `bench.py`."""

import json
from pathlib import Path
from typing import Any

from contenders import Workload
from figures import speed_ratios
from goals import missed
from limits import bound_seconds
from rich.console import Console
from rich.table import Table
from roster import REFERENCE, REFERENCE_BF16, numbers_of

from openmythos.analysis import plots
from openmythos.files import read_json, write_json

OUT = Console(highlight=False, markup=False)
Result = dict[str, Any]
# What a result holds by figure; a later run of some figures replaces these.
BY_FIGURE = ("seconds", "fastest_seconds", "first_call_seconds", "failed", "runs")
BY_FIGURE += ("ratio", "ratio_of_fastest", "ratio_in_bf16")
BY_FIGURE += ("share_of_bound", "share_of_bound_reread")


def compare(workload: Workload, result: Result, limits: dict[str, float]) -> None:
    """Add ratios to the reference and shares of the bound to a result.

    Ratios of medians, of the fastest calls (which other programs disturb least), and of contenders
    in bf16 to the reference in bf16, where that was timed. Shares of decoding have two readings,
    see `limits.decode_bytes`.
    """
    result["ratio"] = _ratios(result["seconds"], REFERENCE)
    result["ratio_of_fastest"] = _ratios(result["fastest_seconds"], REFERENCE)
    result["ratio_in_bf16"] = {
        figure: {name: ratio for name, ratio in found.items() if "bf16" in name}
        for figure, found in _ratios(result["seconds"], REFERENCE_BF16).items()
    }
    result["share_of_bound"], result["share_of_bound_reread"] = {}, {}
    for figure, times in result["seconds"].items():
        for key, reread in (("share_of_bound", False), ("share_of_bound_reread", True)):
            if reread and not figure.startswith("decode"):
                continue
            shares = result[key][figure] = {}
            for name, time in times.items():
                peak, size = numbers_of(name)
                peak = result["fp32_products"] if peak == "fp32" else peak
                bound = bound_seconds(workload, figure, limits, peak, size, reread=reread)
                shares[name] = bound / time


def _ratios(seconds: dict[str, dict[str, float]], base: str) -> dict[str, dict[str, float]]:
    return {
        figure: {name: times[base] / time for name, time in times.items()}
        for figure, times in seconds.items()
        if base in times
    }


def print_table(result: Result) -> None:
    """Milliseconds, ratio to the reference, share of the bound (of decoding: both readings)."""
    names = list(result["cache_bytes_per_token"])
    title = f"workload {result['workload']['name']}, {result['threads']} thread(s)"
    table = Table("", *names, title=f"{title}, {result['device']}")
    for figure in result["seconds"]:
        table.add_row(figure, *(_cell(result, figure, name) for name in names))
    cache, memory = result["cache_bytes_per_token"], result["peak_megabytes"]
    table.add_row("cache, bytes per token", *(f"{cache[name]:.0f}" for name in names))
    if memory:
        cells = [f"{memory[name]:.0f} MiB" if name in memory else "" for name in names]
        table.add_row("peak memory, training", *cells)
    OUT.print(table)
    for key, what in (
        ("ratio_of_fastest", f"fastest calls, times as fast as {REFERENCE}"),
        ("ratio_in_bf16", f"times as fast as {REFERENCE_BF16}"),
    ):
        for figure, found in result[key].items():
            shown = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in found.items())
            OUT.print(f"{figure}, {what}: {shown}")
    for name, why in result["skipped"].items():
        OUT.print(f"skipped: {name}: {why}")
    for figure, failures in result["failed"].items():
        for name, why in failures.items():
            OUT.print(f"failed: {figure}, {name}: {why}")


def _cell(result: Result, figure: str, name: str) -> str:
    def of(key: str) -> Any:
        return result[key].get(figure, {}).get(name)

    if of("seconds") is None:
        return "failed" if of("failed") else ""
    ratio = "" if of("ratio") is None else f"{of('ratio'):.2f}x "
    reread = of("share_of_bound_reread")
    both = "" if reread is None else f"/{100 * reread:.0f}"
    return f"{1e3 * of('seconds'):.2f} ms {ratio}{100 * of('share_of_bound'):.0f}{both}%"


def merge(folder: Path, results: list[Result]) -> list[Result]:
    """These results with what an earlier file holds: other figures, other numbers of threads."""
    path = file_of(folder, results)
    kept = read_json(path)["results"] if path.exists() else []
    kept = {result["threads"]: result for result in kept}
    for result in results:
        before = kept.get(result["threads"], {})
        for key in BY_FIGURE:
            result[key] = before.get(key, {}) | result[key]
        for key in ("cache_bytes_per_token", "skipped", "peak_megabytes"):
            result[key] = before.get(key, {}) | result[key]
        for figure in result["seconds"]:  # failures of an earlier run
            if not set(result["failed"].get(figure, {})) - set(result["seconds"][figure]):
                result["failed"].pop(figure, None)
        kept[result["threads"]] = result
    return sorted(kept.values(), key=lambda result: int(result["threads"]))


def file_of(folder: Path, results: list[Result]) -> Path:
    return folder / f"bench-{results[0]['workload']['name'].replace(' ', '-')}.json"


def write(results: list[Result], machine: dict[str, Any], folder: Path) -> None:
    """Write bench-NAME.json, .png and .csv, and print the goals that were missed.

    The folder's name is the kind of processor.
    """
    folder.mkdir(parents=True, exist_ok=True)
    below = missed(results, folder.name)
    for text in below:
        OUT.print(f"goal missed: {text}")
    path = file_of(folder, results)
    found = {"hardware": machine, "results": results, "goals_missed": below}
    write_json(json.loads(json.dumps(found)), path)
    draw(results, path.with_suffix(".png"))


def draw(results: list[Result], path: Path) -> None:
    """Draw ratios to the reference; no figure if the reference was not timed."""
    bars = {
        f"{result['workload']['name']}, {result['threads']} thread(s)": {
            figure: {name: ratio for name, ratio in ratios.items() if name != REFERENCE}
            for figure, ratios in result["ratio"].items()
        }
        for result in results
        if result["ratio"]
    }
    if not bars:
        return
    rows = [
        {"workload": panel, "figure": figure, "contender": name, "ratio": ratio}
        for panel, figures in bars.items()
        for figure, ratios in figures.items()
        for name, ratio in ratios.items()
    ]
    plots.save_figure(speed_ratios(bars, reference="open-mythos 0.5.0"), path, rows)
