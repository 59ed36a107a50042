"""The evaluation that comes with a run: held-out loss against loops, as JSON, CSV and PNG."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from openmythos.analysis import plots
from openmythos.config import ConfigError, write_json
from openmythos.data.corpus import compression_baselines
from openmythos.data.shards import TokenShards, write_shards
from openmythos.eval.likelihood import Likelihood, depth_sweep
from openmythos.train.config import DataConfig
from openmythos.train.metrics import read_metrics
from openmythos.train.run import Run, open_data

# A curve that gains less than this share from all its loops is called nearly flat.
FLAT = 0.01


@dataclass(frozen=True)
class LoopReport:
    """Held-out likelihood at each number of loops, and what plain compressors make of the bytes."""

    loops: Mapping[int, Likelihood]
    compressors: Mapping[str, float]
    mean_loops: float

    @property
    def bits_per_byte(self) -> dict[int, float]:
        return {loop: found.bits_per_byte for loop, found in self.loops.items()}

    @property
    def best(self) -> float:
        return min(self.bits_per_byte.values())

    @property
    def gain(self) -> float:
        """Share of the loss at the fewest loops that the best number of loops takes away."""
        fewest = self.bits_per_byte[min(self.loops)]
        return (fewest - self.best) / fewest

    def verdict(self) -> str:
        """One sentence on what more loops bring."""
        fewest, flat = min(self.loops), self.gain < FLAT
        gain = f"{100 * self.gain:.1f}% fewer bits than {fewest} loop{'s' if fewest > 1 else ''}"
        if flat:
            return (
                f"The curve against loops is nearly flat ({gain} at best): "
                "after so short a training more loops hardly help this model."
            )
        best = min(self.bits_per_byte, key=self.bits_per_byte.__getitem__)
        return f"Looping helps: {best} loops need {gain}."


def evaluate(
    run: Run,
    loops: Sequence[int],
    *,
    data: Sequence[str] = (),
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> LoopReport:
    """Score the run's held-out text, or all text of `data`, with its newest checkpoint."""
    if data:
        with TemporaryDirectory() as folder:
            corpus = open_data(DataConfig(paths=tuple(data), field=run.config.data.field))
            shards = write_shards(corpus.documents(), run.tokenizer, folder)
            text = "".join(document.text for document in corpus.documents()).encode()
            return _evaluate(run, shards, text, loops, device, progress)
    return _evaluate(run, run.shards("held_out"), None, loops, device, progress)


def _evaluate(
    run: Run,
    shards: TokenShards,
    text: bytes | None,
    loops: Sequence[int],
    device: str,
    progress: Callable[[int, int], None] | None,
) -> LoopReport:
    config = run.config.train
    found = depth_sweep(
        run.load_model(device),
        shards,
        loops,
        seq_len=config.seq_len,
        precision=config.precision,
        progress=None if progress is None else lambda done: progress(done, len(shards) - 1),
    )
    text = decode_text(run, shards) if text is None else text
    return LoopReport(found, compression_baselines(text), float(config.loops.mean_loops))


def decode_text(run: Run, shards: TokenShards) -> bytes:
    """The bytes behind token shards, start tokens dropped."""
    return run.tokenizer.decode(shards.read(0, len(shards)).tolist()).encode()


def write_report(report: LoopReport, folder: Path) -> None:
    """eval.json, loops.png and loops.csv in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"num_loops": loop, **asdict(found)} for loop, found in report.loops.items()]
    write_json(
        {
            "held_out": rows,
            "compressors_bits_per_byte": dict(report.compressors),
            "mean_loops_in_training": report.mean_loops,
            "verdict": report.verdict(),
        },
        folder / "eval.json",
    )
    figure = plots.loss_against_loops(
        {"held-out text": report.bits_per_byte},
        references=report.compressors,
        trained_loops=report.mean_loops,
    )
    plots.save_figure(figure, folder / "loops.png", rows)


def write_loss_curve(run: Run) -> None:
    """loss.png and loss.csv in the run folder."""
    metrics = read_metrics(run.folder)
    if not metrics:
        raise ConfigError(f"{run.folder}: no step has been logged yet")
    points, tokens = [], 0.0
    for entry in metrics:
        tokens = (entry["step"] + 1) * entry["tokens"]
        points.append((tokens, entry["loss"]))
    figure = plots.loss_curve({"training": points})
    rows = [{"tokens": tokens, "loss": loss} for tokens, loss in points]
    plots.save_figure(figure, run.folder / "loss.png", rows)
