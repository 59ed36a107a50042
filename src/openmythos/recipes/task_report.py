"""The evaluation of a run on a task: accuracy by hops and loops, as JSON, CSV and PNG."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from openmythos.analysis import plots, study_plots
from openmythos.config import ConfigError, to_dict
from openmythos.eval.accuracy import accuracy_map
from openmythos.files import write_json
from openmythos.recipes.report import FILE
from openmythos.train.config import TaskData, TiedLoops
from openmythos.train.run import Run

# Multiples of the largest number of hops in training, and of its number of loops.
_HOPS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
_LOOPS = (*_HOPS, 4.0, 5.0)


@dataclass(frozen=True)
class HopsReport:
    """`accuracy[hops][loops]` of the checkpoint after `step` steps."""

    accuracy: Mapping[int, Mapping[int, float]]
    data: TaskData
    step: int
    precision: str
    device: str


def evaluate(
    run: Run,
    loops: Sequence[int] = (),
    *,
    device: str = "auto",
    precision: str = "auto",
    step: int | None = None,
    examples: int = 400,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> HopsReport:
    """Test problems of up to 3 times the trained hops, as far as task and context length allow.

    `loops` defaults to multiples, up to 5, of the loops in training (of the longest problems).
    `progress` is called with (hop counts done, hop counts in total).
    """
    data = run.config.data
    assert isinstance(data, TaskData)
    model, step = run.load_checkpoint(device, step=step)
    chosen = run.choose_precision(precision, model.device)
    hops = list(_askable(run, data))
    found: dict[int, dict[int, float]] = {}
    for hop in hops:
        found |= accuracy_map(
            model,
            data.task,
            (hop,),
            loops or _usual_loops(run, data),
            thoughts=data.thoughts,
            examples=examples,
            precision=chosen,
        )
        progress(len(found), len(hops))
    return HopsReport(found, data, step, chosen, str(model.device))


def _askable(run: Run, data: TaskData) -> Iterator[int]:
    for hops in sorted({max(data.min_hops, round(share * data.max_hops)) for share in _HOPS}):
        try:
            tokens = data.problems(1, hops, torch.Generator()).tokens
        except ConfigError:
            return  # the task has no problems so long
        if tokens.shape[1] > run.config.model.context:
            return
        yield hops


def _usual_loops(run: Run, data: TaskData) -> tuple[int, ...]:
    loops = run.config.train.loops
    most = data.max_hops if isinstance(loops, TiedLoops) else float(loops.mean_loops)
    return tuple(sorted({max(1, round(share * most)) for share in _LOOPS}))


def write_report(report: HopsReport, folder: Path) -> None:
    """Write eval.json, hops.png and hops.csv to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"hops": hops, "num_loops": loops, "accuracy": share}
        for hops, row in report.accuracy.items()
        for loops, share in row.items()
    ]
    found = {
        "task": to_dict(report.data),
        "step": report.step,
        "precision": report.precision,
        "device": report.device,
        "accuracy": rows,
    }
    write_json(found, folder / FILE)
    best = {hops: [max(row.values())] for hops, row in report.accuracy.items()}
    figure = study_plots.hops_against_loops(
        report.accuracy, {"this run": best}, trained_hops=report.data.max_hops
    )
    plots.save_figure(figure, folder / "hops.png", rows)
