"""Write what results/ says into README.md and docs/; no number there is typed by hand.

python benchmarks/claims.py           # update README.md and the generated parts of docs/
python benchmarks/claims.py --check   # exit code 1 if one of them is out of date
"""

import argparse
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from speed_claims import (
    bench_rows,
    cache_rows,
    floors_table,
    gpu_tables,
    kinds_table,
    load,
    row,
    scaling_rows,
    speed_tables,
)

from openmythos.studies import storage
from openmythos.studies.report import beside_the_paper, deviations
from openmythos.studies.runner import STUDIES
from openmythos.studies.statistics import mean_and_half_width

ROOT = Path(__file__).parents[1]
# Not among the README's nine rows: one explains the demo, in a footnote there; others are about a
# hypothesis of this project's own, or are details of a claim.
IN_DOCS_ONLY = {
    "lora-between-loops",
    "looped-scaling",
    "loop-use",
    "what-extrapolation-needs",
    "inside-the-loop",
    "linear-frontier",
    "capacity-and-manipulation",
    "latent-reasoning",
    "universal-transformer",
    "contrastive-loops",
    "loops-against-tokens",
    "ltg-as-published",
    "two-hops-in-english",
    "in-context-hops",
}


def study_rows(results: Path) -> Iterator[str]:
    """A table row for each study that has been run, in at most 25 words."""
    for name, study in STUDIES.items():
        if name not in IN_DOCS_ONLY and (results / name / "report.md").exists():
            finding = load(results, f"{name}/results.json")["finding"]
            verdict = f"[{finding['verdict']}](results/{name}/report.md)"
            yield row(study.headline, finding["brief"], verdict)


def demo_numbers(results: Path, name: str = "demo") -> tuple[dict[int, list[float]], int]:
    """(held-out bits per byte of every seed by loops, number of loops with the best mean)."""
    runs = load(results, f"{name}/results.json")["runs"]
    bits = {
        int(loops): [run["held_out"][loops]["bits_per_byte"] for run in runs]
        for loops in sorted(runs[0]["held_out"], key=int)
    }
    return bits, min(bits, key=lambda loops: statistics.mean(bits[loops]))


def plus_minus(values: list[float], sign: str = "") -> str:
    mean, half = mean_and_half_width(values)
    return f"{mean:{sign}.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def counted(loops: int) -> str:
    return f"{loops} loop{'s' * (loops != 1)}"


def demo_sentence(results: Path) -> str:
    """The README's sentence on the results of the demo's language model."""
    bits, best = demo_numbers(results)
    demo = load(results, "demo/results.json")
    compressed = demo["runs"][0]["compressors_bits_per_byte"]
    shown = ", ".join(
        f"{plus_minus(values)} at {counted(loops)}{' (its best)' * (loops == best)}"
        for loops, values in bits.items()
        if loops in (min(bits), best, max(bits))
    )
    return (
        "Held-out bits per byte of the demo's language model (mean and 95% interval of "
        f"{len(demo['runs'])} seeds): {shown}; gzip -9 needs {compressed['gzip-9']:.3f}, xz -9 "
        f"{compressed['xz-9']:.3f}: `{demo['command']}` ([results](results/demo/results.json))."
    )


def demo_rows(results: Path) -> Iterator[str]:
    demo = load(results, "demo/results.json")
    bits, best = demo_numbers(results)
    first, last = min(bits), max(bits)
    compressed = demo["runs"][0]["compressors_bits_per_byte"]
    gzip, xz = compressed["gzip-9"], compressed["xz-9"]
    shown = dict.fromkeys((first, best, last))
    yield row(
        "the demo model learns: held-out bits per byte below gzip -9 "
        f"({gzip:.3f}); xz -9 needs {xz:.3f}",
        ", ".join(f"{plus_minus(bits[n])} at {counted(n)}" for n in shown)
        + f" (mean and 95% interval of {len(demo['runs'])} seeds)",
        f"`{demo['command']}` ([results](results/demo/results.json))",
    )
    more = best if best != first else last
    change = [b - a for a, b in zip(bits[first], bits[more], strict=True)]
    mean, half = mean_and_half_width(change)
    yield row(
        "more loops lower the demo model's loss",
        ("" if mean + half < 0 else "**no**, not after so short a training: ")
        + f"{counted(more)} against {first}: {plus_minus(change, '+')} bits per byte",
        "same",
    )


def demo_conditioning_rows(results: Path) -> Iterator[str]:
    """What tells the demo's loops apart: an embedding against LoRA, by paired seeds."""
    (ours, _), (lora, _) = demo_numbers(results), demo_numbers(results, "demo-lora")
    last = max(ours)
    change = [a - b for a, b in zip(ours[last], lora[last], strict=True)]
    yield row(
        "the demo model is better with an embedding of the loop than with LoRA per loop",
        f"{plus_minus(change, '+')} bits per byte at {counted(last)}; lower in "
        f"{sum(each < 0 for each in change)} of {len(change)} seeds",
        "the same with `--set` as its `--help` says ([results](results/demo-lora/results.json))",
    )


def scale_rows(results: Path) -> Iterator[str]:
    kills, memory = load(results, "scale/kills.json"), load(results, "scale/memory.json")
    points, same = kills["kills"], kills["compared"]
    inside = sum(point["during_a_checkpoint"] for point in points)
    yield row(
        "a training run killed at random moments and resumed ends as one left alone",
        f"{len(points)} stops by SIGKILL, SIGTERM or a full disk, {inside} inside a checkpoint: of "
        f"{same['steps']} steps {same['steps_that_differ']}, of {same['tensors']} weights "
        f"{same['tensors_that_differ']} differ by a bit",
        "`python benchmarks/kills.py` ([results](results/scale/kills.json))",
    )
    ranks = load(results, "scale/two-ranks.json")["rows"]
    loss, norm = (
        max(each[f"largest_difference_of_{key}"] for each in ranks)
        for key in ("loss", "gradient_norm")
    )
    steps = load(results, "scale/collectives.json")["messages_per_step"]["shards"]
    gathers = [f"{step['all_gathers']} all-gathers a step at {step['loops']}" for step in steps]
    yield row(
        "several processes train as one does, with sharded weights, replicas, and expert "
        "parallelism",
        f"20 steps on 2 and 4 processes: losses within {loss:.0e}, gradient norms within "
        f"{norm:.0e}; {gathers[0]} loop, {gathers[-1]} loops",
        "`python benchmarks/ranks_together.py` ([results](results/scale/two-ranks.json))",
    )
    every, last, checkpointed = (
        memory["by_loops"][mode] for mode in ("all loops", "last 4 loops", "recomputed")
    )
    yield row(
        "the memory of training does not grow with loops where the last few carry gradient",
        f"preset small, 2048 tokens: {last['4']['mib']:.0f}, {last['16']['mib']:.0f}, "
        f"{last['64']['mib']:.0f} MiB at 4, 16, 64 loops; {every['64']['mib']:.0f} at 64 with all, "
        f"{checkpointed['64']['mib']:.0f} with activation checkpointing",
        "`python benchmarks/memory.py` ([results](results/scale/memory.json))",
    )
    ratios = {name: plan["ratio"] for name, plan in memory["plan"].items()}
    wide = [ratio for name, ratio in ratios.items() if name.startswith("fp32")]
    yield row(
        "`openmythos plan` estimates the memory of training",
        f"{min(wide):.0%} to {max(wide):.0%} of what is measured in fp32, alone and on two ranks; "
        f"{ratios['bf16']:.0%} in bf16 on a CPU (kernels made at run time are not counted)",
        "same",
    )
    loader = load(results, "scale/loader.json")
    yield row(
        "training does not wait for data",
        f"a batch takes {loader['share']:.2%} of a step of the recipe small",
        "`python benchmarks/loader.py` ([results](results/scale/loader.json))",
    )


PROVEN = (
    row(
        "cached decoding equals the full forward pass, for every variant, any num_loops, padding "
        "and chunked prefill",
        "difference below 1e-4 in fp32",
        "`pytest tests/model/test_invariants.py`",
    ),
    row(
        "every decay is below 1 in fp32, bf16 and fp16, for any parameter value",
        "property test",
        "`pytest tests/recurrence/test_injection.py`",
    ),
    row(
        "same logits as transformers' DeepSeek-V3, Llama, Mistral, OLMo 2 and Qwen3 layers with "
        "the same weights",
        "to 1e-4, with gradients, cache and left padding",
        "`pytest tests/nn/test_parity.py`",
    ),
    row(
        "a resumed run equals the uninterrupted one",
        "bit for bit",
        "`pytest tests/train/test_run.py`",
    ),
    row(
        "preset names state the parameters",
        "within 5%, counted without allocating",
        "`pytest tests/model/test_presets.py`",
    ),
)


def table(*parts: Iterable[str]) -> str:
    rows = [line for part in parts for line in part]
    return "\n".join(["| claim | measured | command |", "|---|---|---|", *rows])


def claims_table(results: Path) -> str:
    """The README's table: the studies."""
    return "\n".join(["| claim | here | verdict |", "|---|---|---|", *study_rows(results)])


def in_docs(text: str) -> str:
    """The text with links relative to docs/ instead of the repository root."""
    return text.replace("](results/", "](../results/").replace("](docs/", "](")


def replaced(text: str, name: str, content: str) -> str:
    """The text with new content between the two markers of that name."""
    begin, end = f"<!-- {name}: from results/, by `make claims` -->", f"<!-- end of {name} -->"
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{content}\n{end}{rest.split(end, 1)[1]}"


def results_page(results: Path) -> str:
    """docs/results.md: a scoreboard, then a screen per study that leads to its report."""
    done = {
        name: stored
        for name in STUDIES
        if (stored := storage.load(results / name / "results.json")) and stored.finding
    }
    lines = [
        "# Results",
        "",
        "Written by `make claims` from `results/`. Each study is one command (`openmythos study "
        "NAME`), one file in `src/openmythos/studies/` and one folder in `results/`.",
        "",
        "## Scoreboard",
        "",
        "| claim | paper | here | verdict | seeds |",
        "|---|---|---|---|---|",
    ]
    for name, stored in done.items():
        cells = (
            f"[{STUDIES[name].headline}](#{name})",
            STUDIES[name].paper,
            stored.finding.brief,
            f"**{stored.finding.verdict}**",
            f"{len({run.seed for run in stored.runs})}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    missing = [name for name in STUDIES if name not in done]
    lines += ["", f"Not run yet: {', '.join(missing)}.", ""] if missing else [""]
    for path in sorted(results.glob("unfinished/*/results.json")):
        name = path.parent.name
        lines += [
            f"{name} has {len(load(path.parent, path.name)['runs'])} runs and no verdict; "
            f"`openmythos study {name} --seeds 5 --out results/unfinished` goes on.",
            "",
        ]
    lines += ["## What to believe", "", BELIEVE, "", "## How verdicts are made", "", VERDICTS, ""]
    for name, stored in done.items():
        lines += screen(name, stored)
    lines += [
        "## Other claims",
        "",
        "Speed, memory and cache are in [performance.md](performance.md), what tests hold in "
        "[architecture.md](architecture.md).",
        "",
        in_docs(table(demo_rows(results), demo_conditioning_rows(results), scale_rows(results))),
        "",
    ]
    return "\n".join(lines)


def screen(name: str, stored: storage.Stored) -> Iterator[str]:
    """What one study asked, found, and does not show."""
    study, finding = STUDIES[name], stored.finding
    assert finding is not None
    seconds = sum(one.seconds for one in (*stored.runs, *stored.trials))
    yield from (f"## {name}", "", f"**{study.claim}** ({study.source})", "")
    yield from (f"**{finding.verdict.capitalize()}.** {finding.sentence}", "")
    yield from (f"![{study.headline}](../results/{name}/figure.png)", "")
    if study.caption:
        yield from (f"*{study.caption}*", "")
    if beside := [*beside_the_paper(study, finding)]:
        yield from (*beside, "")
    if changed := deviations(study, stored):
        yield from ("Deviations:", "", *(f"- {point}" for point in changed), "")
    yield from ("Not shown:", "")
    yield from (f"- {point}" for point in study.not_shown)
    yield from (
        "",
        f"`openmythos study {name}`, {len(stored.runs)} runs and {len(stored.trials)} trials in "
        f"{seconds / 60:.0f} minutes of CPU time. Table, every seed and learning rates: "
        f"[report](../results/{name}/report.md).",
        "",
    )


BELIEVE = (
    "These are models of 10^5 to 10^6 parameters, trained for minutes. On chains of lookups a "
    "block that is looped does what stacks of layers of the same size do not: it answers chains "
    "three times as long as any it was trained on, when it is looped longer. With full attention, "
    "or trained on five hops alone, it does not; by a paper's recipe with full attention and one "
    "target, it goes one hop further than trained, however many loops it runs. Where the facts "
    "stand in the question, training was too short for all but one loop of three, which goes two "
    "hops further. With LTI injection or a free diagonal it learns to sooner than with a learned "
    "map of state and input, which gets there, too. It stops by itself a few loops after the "
    "answer is there, if a rule waits until the whole sequence has converged; trained gates do so, "
    "too, ACT does not. One layer looped six times does what six layers do on p-hop and on sums; "
    "on words of S_5, which neither solves, it is 21 points behind. A looped layer composes nine "
    "of ten pairs of facts that training only ever asked alone, where six layers, as good on all "
    "other pairs, compose one of five. Asked in sentences, with the answer as the only target, "
    "neither composes such pairs. LTI injection keeps the state bounded at every learning rate "
    "that was tried, eight times deeper than trained; a learned map of state and input does not at "
    "the highest, and learns nothing there, but is no worse at lower ones; a diagonal without "
    "LTI's constraint is as good as LTI. Where single facts and chains are learned together, "
    "experts add facts and no depth, loops add depth and no facts; a wider layer without experts "
    "adds facts, too. A token meets other experts in the first loop than later, and this matters; "
    "from then on the experts of the loop before do as well as a loop's own. On text a mixture is "
    "no better than a dense layer as wide as its active part; with a balancing bias for every "
    "loop, whose step decays, its load is a third as uneven and its loss 0.02 nats lower, and an "
    "embedding of the loop lowers it by 0.04. Where the answer is the only target, loops do not "
    "get beyond three or four lookups, while latents, whose curriculum sees the steps, follow six. "
    "On text a small model uses its loops only where no layer outside of the loop does their work; "
    "there the loss falls along an exponential until about the trained depth, and many more loops "
    "do no harm. With layers outside it is lower at every number of loops. Layers of their own "
    "save several times what as many loops of one layer save, and at equal compute one loop on "
    "more tokens beats two, four and eight at each of three budgets, though by less at the "
    "largest. So on language nothing here speaks for loops at this size, and nothing is said of "
    "any other."
)

VERDICTS = (
    "A verdict is computed by `judge` in the study's file, from bars written down before its runs; "
    "the commit of that rule is stored with them, and what was changed later is listed in the "
    "report. It is one of four: **holds**, if every bar is met; **holds in part**, if the central "
    "bar and at least half of all are; **does not hold here**, at this size and on these tasks; "
    "**premise not met**, where what the claim takes for granted is not so here, and nothing was "
    "tested.\n\nLearning rates are tried at full length with three seeds that no run has (one or "
    "two in some studies, which say so), and scored on validation text or problems that are never "
    "reported; the grid grows until its best is inside. Each seed has its own table of facts. "
    "Success counts come with the interval of Clopper and Pearson, other numbers with Student's t "
    "over seeds, and arms are compared by paired differences. `--report-only` judges the kept runs "
    "again and trains nothing."
)


def pages(root: Path) -> dict[Path, str]:
    """The content of every generated page, by path."""
    results = root / "results"
    readme, performance, architecture = (
        root / name for name in ("README.md", "docs/performance.md", "docs/architecture.md")
    )
    claims = {"claims": claims_table(results), "demo": demo_sentence(results)}
    speed = {
        "ratios": in_docs(table(bench_rows(results), scaling_rows(results), cache_rows(results))),
        "speed": speed_tables(results),
        "kinds": kinds_table(results),
        "floors": floors_table(results),
        "gpus": gpu_tables(results),
    }
    return {
        readme: all_replaced(_read(readme), claims),
        performance: all_replaced(_read(performance), speed),
        architecture: all_replaced(_read(architecture), {"tests": table(PROVEN)}),
        root / "docs/results.md": results_page(results),
    }


def all_replaced(text: str, contents: Mapping[str, str]) -> str:
    for name, content in contents.items():
        text = replaced(text, name, content)
    return text


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = {path: text for path, text in pages(ROOT).items() if text != _read(path)}
    if check:
        sys.exit(f"not what results/ says: {', '.join(map(str, stale))}" if stale else 0)
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
