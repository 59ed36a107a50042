"""The engine against other ways to serve the same requests; writes results/serve/<processor>.

    python benchmarks/serve.py rows --workload S
    python benchmarks/serve.py figures

rows      many requests of equal length at once, against `generate` one by one, which is also
          measured without the native kernel, and as one batch: what an engine can reach at best
static    outputs of 16 to 128 tokens, against batches that wait for their longest
depths    2, 4, 8 or 16 loops by request, against rows that wait for the deepest of them
equal     the same with equal depths
boundary  the same requests as `depths`, with other settings of the boundary
drafts    self-speculation of one row against the same engine without; needs `--run`, a folder of
          `openmythos train demo`, as only a trained model's tokens say how many drafts are right

Elsewhere weights are not trained: no contender's time depends on them. One thread; contenders take
turns, and every number is the median of the rounds. Seconds are CPU time of the process, which
other work on the machine disturbs least.
"""

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from contenders import WORKLOADS, Workload
from figures import cost_lines, speed_ratios
from host import processor_kind
from rich.console import Console

from openmythos import OpenMythos, kernels
from openmythos.analysis import plots
from openmythos.files import read_json, write_json
from openmythos.inference.engine import Engine
from openmythos.inference.generation import Request, stream
from openmythos.inference.request import Draft, EngineLimits, EngineRequest, EngineStats, NewToken
from openmythos.inference.sampling import Sampling
from openmythos.machine import describe, keep_freed_memory
from openmythos.train.run import Run

OUT = Console(highlight=False, markup=False)
DEPTHS = (2, 4, 8, 16)
PAGES = 32_768
NEVER = 10**6  # a boundary that waits for every row: all rows get their next token together
# (num_loops, temperature) and (loops, tokens) of drafts
DRAFTED = [(loops, heat) for loops in (8, 16) for heat in (0.0, 0.8)]
DRAFTS = [(loops, tokens) for loops in (1, 2, 4) for tokens in (1, 2, 4)]


@dataclass
class Outcome:
    """One contender's work on some requests."""

    tokens: int
    seconds: float
    per_token: Mapping[int, float] = field(default_factory=dict)  # seconds, by num_loops
    accepted: float = 0.0  # share of the drafts

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def requests(
    workload: Workload,
    count: int,
    *,
    prompt: tuple[int, int],
    new: tuple[int, int],
    depths: Sequence[int],
) -> list[EngineRequest]:
    """Random prompts; lengths are drawn from the closed ranges, depths take turns."""
    draw = random.Random(0)
    return [
        EngineRequest(
            prompt=tuple(draw.randrange(workload.vocab) for _ in range(draw.randint(*prompt))),
            options=Request(
                max_new_tokens=draw.randint(*new), num_loops=depths[number % len(depths)]
            ),
        )
        for number in range(count)
    ]


def one_by_one(model: OpenMythos, asked: Sequence[EngineRequest]) -> Outcome:
    """`generate` for each request; of many requests the first four stand for all."""
    tokens, start = 0, time.process_time()
    for request in asked[:4]:
        tokens += sum(1 for _ in stream(model, torch.tensor([request.prompt]), request.options))
    return Outcome(tokens, time.process_time() - start)


def by_torch(model: OpenMythos, asked: Sequence[EngineRequest]) -> Outcome:
    """The same without the native kernel."""
    with kernels.use("torch"):
        return one_by_one(model, asked)


def static_batches(model: OpenMythos, asked: Sequence[EngineRequest], rows: int) -> Outcome:
    """`rows` requests at a time, padded on the left, each batch until its longest is done."""
    tokens, start = 0, time.process_time()
    for first in range(0, len(asked), rows):
        batch = asked[first : first + rows]
        width = max(len(request.prompt) for request in batch)
        padding = [width - len(request.prompt) for request in batch]
        prompt = torch.tensor(
            [[0] * pad + [*r.prompt] for pad, r in zip(padding, batch, strict=True)]
        )
        mask = torch.arange(width) >= torch.tensor(padding)[:, None]
        longest = max(batch, key=lambda request: request.options.max_new_tokens)
        for _ in stream(model, prompt, longest.options, mask):
            pass
        tokens += sum(request.options.max_new_tokens for request in batch)
    return Outcome(tokens, time.process_time() - start)


def served(
    model: OpenMythos, asked: Sequence[EngineRequest], limits: EngineLimits, *, full: bool = False
) -> Outcome:
    """The engine; with `full` only as long as requests wait, so that all rows are in use."""
    engine, depth, times = Engine(model, limits), {}, {}
    start = time.process_time()
    for request in asked:
        depth[engine.add(request)] = request.options.num_loops
    tokens, end = 0, start
    while not engine.idle and (not full or engine.stats().rows_waiting):
        events = engine.step()
        end = time.process_time()
        for event in events:
            if isinstance(event, NewToken):
                tokens += 1
                times.setdefault(event.request, []).append(end)
    by_depth: dict[int, list[float]] = {}
    for number, at in times.items():
        if len(at) > 1:
            by_depth.setdefault(depth[number], []).append((at[-1] - at[0]) / (len(at) - 1))
    per_token = {loops: statistics.mean(found) for loops, found in sorted(by_depth.items())}
    return Outcome(tokens, end - start, per_token)


Contenders = Mapping[str, Callable[[], Outcome]]


def take_turns(contenders: Contenders, rounds: int) -> dict[str, dict[str, Any]]:
    """The medians of each contender, and of its ratio to the first one of the same round."""
    found: dict[str, list[Outcome]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, run in contenders.items():
            found[name].append(run())
            OUT.print(f"round {number + 1}, {name}: {found[name][-1].tokens_per_second:.0f} tok/s")
    first = next(iter(found.values()))
    return {
        name: {
            "tokens_per_second": statistics.median(o.tokens_per_second for o in outcomes),
            "ratio": statistics.median(
                o.tokens_per_second / base.tokens_per_second
                for o, base in zip(outcomes, first, strict=True)
            ),
            "ratios": [
                o.tokens_per_second / base.tokens_per_second
                for o, base in zip(outcomes, first, strict=True)
            ],
            "accepted": statistics.median(o.accepted for o in outcomes),
            "ms_per_token": {
                str(loops): 1e3 * statistics.median(o.per_token[loops] for o in outcomes)
                for loops in outcomes[0].per_token
            },
        }
        for name, outcomes in found.items()
    }


def engine_limits(rows: int, **changes: Any) -> EngineLimits:
    return EngineLimits(max_rows=rows, pages=PAGES, **changes)


def lockstep(rows: int) -> EngineLimits:
    return engine_limits(rows, boundary_share=1.0, boundary_wait=NEVER)


def rows(model: OpenMythos, workload: Workload, rounds: int) -> dict[str, Any]:
    asked = requests(workload, 32, prompt=(32, 32), new=(64, 64), depths=(workload.loops,))
    contenders: dict[str, Callable[[], Outcome]] = {
        "generate one by one": lambda: one_by_one(model, asked),
        "generate by torch's layers": lambda: by_torch(model, asked),
    }
    for count in (8, 16, 32):
        contenders[f"generate, {count} together"] = lambda count=count: static_batches(
            model, asked[:count], count
        )
        contenders[f"{count} rows"] = lambda count=count: served(
            model, asked[:count], engine_limits(count)
        )
    return take_turns(contenders, rounds)


def static(model: OpenMythos, workload: Workload, rounds: int) -> dict[str, Any]:
    asked = requests(workload, 64, prompt=(16, 64), new=(16, 128), depths=(workload.loops,))
    return take_turns(
        {
            "static batches of 16": lambda: static_batches(model, asked, 16),
            "engine, 16 rows": lambda: served(model, asked, engine_limits(16)),
        },
        rounds,
    )


def depths(model: OpenMythos, workload: Workload, rounds: int) -> dict[str, Any]:
    return _against_lockstep(model, workload, rounds, DEPTHS)


def equal(model: OpenMythos, workload: Workload, rounds: int) -> dict[str, Any]:
    return _against_lockstep(model, workload, rounds, (workload.loops,))


def _against_lockstep(
    model: OpenMythos, workload: Workload, rounds: int, loops: Sequence[int]
) -> dict[str, Any]:
    found = {}
    for count in (8, 16, 32):
        asked = requests(workload, 3 * count, prompt=(16, 16), new=(16, 96), depths=loops)
        contenders = {
            f"lockstep, {count} rows": lockstep(count),
            f"engine, {count} rows": engine_limits(count),
        }
        found |= take_turns(
            {
                name: lambda limits=limits, asked=asked: served(model, asked, limits, full=True)
                for name, limits in contenders.items()
            },
            rounds,
        )
    return found


def boundary(model: OpenMythos, workload: Workload, rounds: int) -> dict[str, Any]:
    asked = requests(workload, 48, prompt=(16, 16), new=(16, 96), depths=DEPTHS)
    settings = {"lockstep": lockstep(16)}
    for share in (0.01, 0.25, 0.4, 0.5, 0.6, 0.75):
        settings[f"at {share:.0%}"] = engine_limits(16, boundary_share=share)
    return take_turns(
        {
            name: lambda limits=limits: served(model, asked, limits, full=True)
            for name, limits in settings.items()
        },
        rounds,
    )


def drafts(run: Run, rounds: int) -> dict[str, Any]:
    """For each num_loops and temperature a grid of drafts; equal tokens are asserted."""
    model, tokenizer = run.load_model().eval(), run.tokenizer
    prompts = [tokenizer.prompt_ids(text) for text in ("A kind of", "To move")]
    found = {}
    for loops, heat in DRAFTED:
        options = Request(max_new_tokens=48, num_loops=loops, sampling=Sampling(temperature=heat))
        asked = [EngineRequest(prompt=tuple(ids), options=options) for ids in prompts]
        wanted = [event for event in _one_row(model, asked)[0] if isinstance(event, NewToken)]

        def contender(draft: Draft | None, asked: Any = asked, wanted: Any = wanted) -> Outcome:
            with_drafts = [replace(request, draft=draft) for request in asked]
            start = time.process_time()
            events, stats = _one_row(model, with_drafts)
            seconds = time.process_time() - start
            assert [event for event in events if isinstance(event, NewToken)] == wanted
            share = stats.accepted / stats.drafted if stats.drafted else 0.0
            return Outcome(len(wanted), seconds, accepted=share)

        grid = {f"{loops} loops, temperature {heat:g}": lambda run=contender: run(None)}
        for shallow, tokens in DRAFTS:
            draft = Draft(loops=shallow, tokens=tokens)
            name = f"{loops} loops, temperature {heat:g}, {tokens} drafted with {shallow}"
            grid[name] = lambda run=contender, draft=draft: run(draft)
        found |= take_turns(grid, rounds)
    return found


def _one_row(model: OpenMythos, asked: Sequence[EngineRequest]) -> tuple[list[Any], EngineStats]:
    engine = Engine(model, engine_limits(1))
    return engine.run(asked), engine.stats()


SECTIONS: dict[str, Callable[[OpenMythos, Workload, int], dict[str, Any]]] = {
    "rows": rows,
    "static": static,
    "depths": depths,
    "equal": equal,
    "boundary": boundary,
}


def measure(section: str, workload: Workload, rounds: int) -> dict[str, Any]:
    model = OpenMythos(workload.config(), seed=0).eval()
    asked = requests(workload, 2, prompt=(9, 9), new=(9, 9), depths=(2, 4))
    served(model, asked, engine_limits(2))  # builds the kernel
    one_by_one(model, asked)  # the first pass of a prompt by torch takes a quarter of a second
    return SECTIONS[section](model, workload, rounds)


def store(section: str, found: Mapping[str, Any], path: Path, machine: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/serve.py " + " ".join(sys.argv[1:])
    write_json({"command": command, "hardware": machine, section: found}, path)
    for name, one in found.items():
        times = ", ".join(f"{n} loops {ms:.1f} ms" for n, ms in one["ms_per_token"].items())
        accepted = f"{one['accepted']:.0%} accepted" if one["accepted"] else ""
        OUT.print(
            f"{name}: {one['tokens_per_second']:.0f} tok/s, {one['ratio']:.2f}x {times}{accepted}"
        )


# Of the panels with bars; each has 8, 16 and 32 rows.
TITLES = {
    "rows": "against one by one",
    "depths": "2 to 16 loops by request, against lockstep",
    "equal": "equal loops, against lockstep",
}


def draw(folder: Path) -> None:
    """Bars against the first contender, time per token by depth, gain of drafts; all as CSV."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    lines: dict[str, dict[float | int, float | int]] = {}
    gains: dict[str, dict[str, dict[float | int, float | int]]] = {}
    table = []
    for path in sorted(folder.glob("*-*.json")):
        section, name = path.stem.rsplit("-", 1)
        stored = read_json(path)[section]
        bars = {}
        for contender, one in stored.items():
            table.append(
                {"workload": name, "section": section, "contender": contender}
                | {key: one[key] for key in ("tokens_per_second", "ratio", "accepted")}
                | {f"ms per token, {n} loops": ms for n, ms in one["ms_per_token"].items()}
            )
            if one["accepted"]:
                asked, _, draft = contender.rpartition(", ")
                tokens, shallow = draft.split(" drafted with ")
                name_of = f"drafts of {shallow} loop{'s' * (shallow != '1')}"
                points = gains.setdefault(asked, {}).setdefault(name_of, {})
                points[int(tokens)] = one["ratio"]
            elif section in TITLES and contender.endswith("rows") and one["ratio"] != 1:
                bars[contender.removeprefix("engine, ")] = {name: one["ratio"]}
            if section == "depths" and contender.endswith("16 rows"):
                label = f"{contender.split(',')[0]}, {name}"
                lines[label] = {int(n): ms for n, ms in one["ms_per_token"].items()}
        for contender, values in bars.items():
            panels.setdefault(TITLES[section], {}).setdefault(contender, {}).update(values)
    in_order = {title: panels[title] for title in TITLES.values() if title in panels}
    figure = speed_ratios(in_order, reference="the other way to serve")
    plots.save_figure(figure, folder / "serve.png", table)
    if lines:
        figure = cost_lines({"loops of the request": lines}, y_labels=("ms per token, 16 rows",))
        plots.save_figure(figure, folder / "time_per_token.png", table)
    if gains:
        panels_by_x = {f"tokens drafted ({asked})": lines for asked, lines in gains.items()}
        labels = ["times as fast as without drafts"] * len(gains)
        figure = cost_lines(panels_by_x, y_labels=labels, logarithmic=False)
        plots.save_figure(figure, folder / "drafts.png", table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=[*SECTIONS, "drafts", "figures"])
    parser.add_argument("--workload", choices=list(WORKLOADS), default="S")
    parser.add_argument("--run", type=Path, help="of `drafts`: a run folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/serve"))
    options = parser.parse_args()
    if (options.section == "drafts") != (options.run is not None):
        parser.error("--run: a run folder, needed by `drafts` and used by nothing else")
    torch.set_num_threads(1)
    keep_freed_memory()
    folder, section, machine = options.out / processor_kind(), options.section, describe()
    if section == "figures":
        draw(folder)
    elif section == "drafts":
        store(
            section,
            drafts(Run.open(options.run), options.rounds),
            folder / "drafts-demo.json",
            machine,
        )
    else:
        workload = WORKLOADS[options.workload]
        found = measure(section, workload, options.rounds)
        store(section, found, folder / f"{section}-{workload.name}.json", machine)


if __name__ == "__main__":
    main()
