"""The evaluation of a run on text: held-out loss against loops, as JSON, CSV and PNG."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from openmythos.analysis import plots
from openmythos.config import ConfigError, require
from openmythos.data.corpus import compression_baselines
from openmythos.data.shards import TokenShards, write_shards
from openmythos.eval.likelihood import Likelihood, depth_sweep
from openmythos.files import read_json, write_json
from openmythos.hub.load import Source
from openmythos.train.checkpoint import checkpoint_at, step_of
from openmythos.train.config import TextData, TiedLoops
from openmythos.train.metrics import finite_or_none, read_metrics, tokens_seen
from openmythos.train.run import Run, open_data

# If more loops lower the loss by less than this fraction, the curve is called nearly flat.
FLAT = 0.01
HELD_OUT = "held-out text"
FILE = "eval.json"
WINDOW = 1024


@dataclass(frozen=True)
class LoopReport:
    """Likelihood at each number of loops, and bits per byte of general-purpose compressors.

    `text` names the text that was scored, `step` the checkpoint.
    """

    loops: Mapping[int, Likelihood]
    compressors: Mapping[str, float]
    mean_loops: float
    text: str = HELD_OUT
    step: int = 0
    precision: str = "fp32"
    device: str = "cpu"

    @property
    def bits_per_byte(self) -> dict[int, float]:
        return {loop: found.bits_per_byte for loop, found in self.loops.items()}

    @property
    def best(self) -> float:
        return min(self.bits_per_byte.values())

    @property
    def gain(self) -> float:
        """Relative decrease from the loss at the fewest loops to the best loss."""
        fewest = self.bits_per_byte[min(self.loops)]
        return (fewest - self.best) / fewest

    def verdict(self) -> str:
        """One sentence on the effect of more loops; empty if there is nothing to compare."""
        bad = [loop for loop, bits in self.bits_per_byte.items() if not math.isfinite(bits)]
        if bad:
            return f"The loss at {bad[0]} loops is not finite: the model has diverged."
        if len(self.loops) == 1:
            return ""
        fewest = min(self.loops)
        loops = "1 loop" if fewest == 1 else f"{fewest} loops"
        if self.gain < FLAT:
            return (
                "The curve against loops is nearly flat "
                f"({100 * self.gain:.1f}% fewer bits than {loops} at best): "
                "after so short a training more loops hardly help this model."
            )
        best = min(self.bits_per_byte, key=self.bits_per_byte.__getitem__)
        return (
            f"Looping helps: {self.bits_per_byte[fewest]:.3f} bits per byte at {loops}, "
            f"{self.best:.3f} at {best} ({100 * self.gain:.1f}% fewer)."
        )


def evaluate(
    run: Run,
    loops: Sequence[int],
    *,
    data: Sequence[str] = (),
    device: str = "auto",
    precision: str = "auto",
    step: int | None = None,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> LoopReport:
    """Score the run's held-out text, or all text of `data`; `step` None: the newest checkpoint.

    Precision "auto": fp32 if the run's config says "fp32", else what the device computes natively.
    """
    config = run.config.train
    model, step = run.load_checkpoint(device, step=step)
    chosen = run.choose_precision(precision, model.device)
    with _tokens(run, data) as shards:
        text = decode_text(run, shards)
        found = depth_sweep(
            model, shards, loops, seq_len=config.seq_len, precision=chosen, progress=progress
        )
    scored = ", ".join(data) if data else HELD_OUT
    assert not isinstance(config.loops, TiedLoops)  # only tasks have these
    mean_loops = float(config.loops.mean_loops)
    baselines, on = compression_baselines(text), str(model.device)
    return LoopReport(found, baselines, mean_loops, scored, step, chosen, on)


def evaluate_text(
    source: Source,
    loops: Sequence[int],
    *,
    data: Sequence[str],
    device: str = "auto",
    precision: str = "auto",
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> LoopReport:
    """Score all text of `data` with a model that is not a run, in windows of up to 1024 tokens."""
    model = source.load(device).float()
    chosen, seq_len = source.precision(precision, model.device), min(model.context, WINDOW)
    corpus = open_data(TextData(paths=tuple(data)))
    with TemporaryDirectory() as folder:
        shards = write_shards(corpus.documents(), source.tokenizer, folder)
        found = depth_sweep(
            model, shards, loops, seq_len=seq_len, precision=chosen, progress=progress
        )
    text = "".join(document.text for document in corpus.documents()).encode()
    baselines, on = compression_baselines(text), str(model.device)
    mean_loops = float(model.config.num_loops)
    return LoopReport(found, baselines, mean_loops, ", ".join(data), 0, chosen, on)


@contextmanager
def _tokens(run: Run, data: Sequence[str]) -> Iterator[TokenShards]:
    """The tokens to score."""
    if not data:
        yield run.shards("held_out")
        return
    with TemporaryDirectory() as folder:
        corpus = open_data(TextData(paths=tuple(data), field=run.text.field))
        yield write_shards(corpus.documents(), run.tokenizer, folder)


def decode_text(run: Run, shards: TokenShards) -> bytes:
    """The text of token shards as UTF-8, without bos tokens."""
    return run.tokenizer.decode(shards.read(0, len(shards)).tolist()).encode()


def report_folder(run: Run, data: Sequence[str], step: int | None, out: str = "") -> Path:
    """Where a report goes: the run folder for held-out text and the newest checkpoint, else eval/.

    `out` overrides this, but only the default report may go into the run folder itself.
    """
    newest = step is None or step == step_of(checkpoint_at(run.folder))
    own = not data and newest
    if out:
        folder = Path(out)
        require(folder.is_dir() or not folder.exists(), "out", out, "is not a folder")
        allowed = "holds what the newest checkpoint makes of the held-out text"
        require(own or folder.resolve() != run.folder.resolve(), "out", out, allowed)
        return folder
    names = [re.sub(r"[^\w.-]+", "_", Path(path).name) for path in data]
    names += [] if newest else [f"step-{step:08d}"]
    return run.folder if own else run.folder / "eval" / "+".join(names)[:100]


def write_report(report: LoopReport, folder: Path) -> None:
    """Write eval.json, loops.png and loops.csv to `folder`.

    An eval.json of the same text, checkpoint and precision keeps its results at other loop counts.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = _written(folder / FILE, report)
    report = replace(report, loops=dict(sorted({**kept, **report.loops}.items())))
    rows = [{"num_loops": loop, **asdict(found)} for loop, found in report.loops.items()]
    own = report.text == HELD_OUT
    found = {
        "text": report.text,
        "step": report.step,
        "precision": report.precision,
        "device": report.device,
        "held_out" if own else "other_text": rows,
        "compressors_bits_per_byte": dict(report.compressors),
        "mean_loops_in_training": report.mean_loops,
        "verdict": report.verdict(),
    }
    write_json(finite_or_none(found), folder / FILE)
    figure = plots.loss_against_loops(
        {report.text: report.bits_per_byte},
        references=report.compressors,
        trained_loops=report.mean_loops,
        y_label="held-out bits per byte" if own else "bits per byte",
    )
    plots.save_figure(figure, folder / "loops.png", rows)


def _written(path: Path, report: LoopReport) -> dict[int, Likelihood]:
    """Likelihoods in an eval.json if it has the report's text, checkpoint and precision."""
    try:
        found = read_json(path)
        same = (report.text, report.step, report.precision)
        if (found["text"], found["step"], found["precision"]) != same:
            return {}
        rows = found["held_out" if report.text == HELD_OUT else "other_text"]
        held = {row.pop("num_loops"): Likelihood(**row) for row in rows}
        sizes = {row.num_bytes for row in (*held.values(), *report.loops.values())}
        whole = all(isinstance(x, int | float) for row in held.values() for x in vars(row).values())
        return held if len(sizes) == 1 and whole else {}
    except (ConfigError, KeyError, TypeError, AttributeError):
        return {}  # missing, or written by another version


def write_loss_curve(run: Run) -> None:
    """Write loss.png and loss.csv to the run folder."""
    metrics = read_metrics(run.folder)
    if not metrics:
        raise ConfigError(f"{run.folder}: no step has been logged yet")
    losses = [entry["loss"] for entry in metrics]
    points = list(zip(tokens_seen(metrics), losses, strict=True))
    panels = {"cross-entropy [nats / token]": {"training": {"": points}}}
    figure = plots.metric_curves(panels, x_label="training tokens", single=True)
    rows = [{"tokens": tokens, "loss": loss} for tokens, loss in points]
    plots.save_figure(figure, run.folder / "loss.png", rows)
