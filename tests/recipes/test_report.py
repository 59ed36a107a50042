"""The evaluation that comes with a run: verdict, files, text to score."""

import csv
import json
import math
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from variants import tiny_config

from openmythos.config import ConfigError
from openmythos.data.corpus import compression_baselines
from openmythos.eval.likelihood import Likelihood, depth_sweep
from openmythos.recipes import report
from openmythos.recipes.report import LoopReport
from openmythos.recurrence.loop_sampling import FixedLoops
from openmythos.train.config import RunConfig, TextData, TrainConfig
from openmythos.train.metrics import MetricsLog, read_metrics
from openmythos.train.run import Run, train

LOOPS = (1, 2, 4)


def with_bits(bits: Mapping[int, float]) -> LoopReport:
    loops = {loop: Likelihood(1.0, value, 2.7, 10, 10) for loop, value in bits.items()}
    return LoopReport(loops, {"gzip-9": 3.0}, 2.0)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("report")
    rng = random.Random(0)
    (folder / "text").mkdir()
    for number in range(20):
        text = " ".join(rng.choice(["loop", "state", "déjà", "vu"]) for _ in range(60))
        (folder / "text" / f"{number}.txt").write_text(text)
    config = RunConfig(
        model=tiny_config(vocab_size=257, context=32),
        data=TextData(paths=(str(folder / "text"),), held_out=0.1),
        train=TrainConfig(
            num_steps=3,
            batch_size=4,
            seq_len=32,
            loops=FixedLoops(mean_loops=2),
            precision="fp32",
        ),
    )
    made = Run.create(folder / "run", config)
    list(train(made))
    return made


def test_gain_is_against_the_fewest_loops() -> None:
    found = with_bits({2: 4.0, 4: 3.0, 8: 3.5})
    assert found.best == 3.0
    assert found.gain == pytest.approx(0.25)
    said = "Looping helps: 4.000 bits per byte at 2 loops, 3.000 at 4 (25.0% fewer)."
    assert found.verdict() == said
    assert "per byte at 1 loop," in with_bits({1: 4.0, 4: 3.0}).verdict()


@pytest.mark.parametrize("bits", [{1: 4.0, 2: 3.99}, {1: 4.0, 2: 4.0}, {1: 4.0, 2: 5.0}], ids=str)
def test_no_gain_is_called_flat(bits: dict[int, float]) -> None:
    found = with_bits(bits)
    assert 0 <= found.gain < report.FLAT
    assert "nearly flat" in found.verdict()


def test_one_count_or_a_diverged_model_gets_no_verdict() -> None:
    assert with_bits({2: 4.0}).verdict() == ""
    for bits in ({1: 4.0, 2: math.nan}, {1: math.inf, 2: 3.0}, {4: math.nan}):
        assert "not finite: the model has diverged" in with_bits(bits).verdict()


def test_a_report_joins_what_is_of_the_same_text_and_checkpoint(tmp_path: Path) -> None:
    def kept(found: LoopReport) -> list[int]:
        report.write_report(found, tmp_path)
        written = json.loads((tmp_path / "eval.json").read_text())
        assert (written["text"], written["step"]) == (found.text, found.step)
        key = "held_out" if found.text == report.HELD_OUT else "other_text"
        return [row["num_loops"] for row in written[key]]

    full = with_bits({1: 4.0, 4: 3.0})
    assert kept(full) == [1, 4]
    assert kept(with_bits({2: 3.5, 4: 3.1})) == [1, 2, 4]
    assert json.loads((tmp_path / "eval.json").read_text())["verdict"].startswith(
        "Looping helps: 4"
    )
    assert kept(replace(with_bits({2: 3.5}), step=7)) == [2]
    assert kept(replace(with_bits({8: 3.5}), step=7, text="a.txt")) == [8]
    (tmp_path / "eval.json").write_text('{"held_out": []}')
    assert kept(with_bits({2: math.nan})) == [2]
    assert "NaN" not in (tmp_path / "eval.json").read_text()
    assert kept(full) == [1, 4]


def test_only_held_out_text_and_newest_checkpoint_go_to_the_run_folder(run: Run) -> None:
    for step in (None, 3):
        assert report.report_folder(run, (), step) == run.folder
        assert report.report_folder(run, (), step, str(run.folder)) == run.folder
    below = run.folder / "eval"
    assert report.report_folder(run, ("x/a.txt", "b*"), None) == below / "a.txt+b_"
    assert report.report_folder(run, (), 2) == below / "step-00000002"
    for data, step in ((("a.txt",), None), ((), 2)):
        with pytest.raises(ConfigError, match="holds what the newest checkpoint makes of"):
            report.report_folder(run, data, step, str(run.folder))
    with pytest.raises(ConfigError, match=r"out = .*config.toml': is not a folder"):
        report.report_folder(run, (), None, str(run.folder / "config.toml"))


def test_held_out_text_is_scored(run: Run) -> None:
    scored: list[tuple[int, int]] = []
    found = report.evaluate(run, LOOPS, progress=lambda done, total: scored.append((done, total)))
    shards = run.shards("held_out")
    assert found.loops == depth_sweep(run.load_model(), shards, LOOPS, seq_len=32)
    assert scored[-1] == (len(shards) - 1, len(shards) - 1)
    assert (found.mean_loops, found.text, found.step) == (2.0, "held-out text", 3)
    text = report.decode_text(run, shards)
    assert len(text) == shards.num_bytes
    assert found.compressors == compression_baselines(text)


def test_other_text_is_scored_whole(run: Run, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("some other text: äöü " * 4)
    found = report.evaluate(run, (1,), data=[str(tmp_path / "other.txt")])
    assert found.text == str(tmp_path / "other.txt")
    text = (tmp_path / "other.txt").read_bytes()
    assert found.loops[1].num_bytes == found.loops[1].tokens == len(text)
    assert found.compressors == compression_baselines(text)


def test_untrained_run_has_nothing_to_score(run: Run, tmp_path: Path) -> None:
    fresh = Run.create(tmp_path / "fresh", run.config)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        report.evaluate(fresh, (1,))


def test_report_is_written_as_json_csv_and_figure(run: Run, tmp_path: Path) -> None:
    found = report.evaluate(run, LOOPS)
    report.write_report(found, tmp_path / "new" / "folder")
    written = json.loads((tmp_path / "new" / "folder" / "eval.json").read_text())
    assert [row["num_loops"] for row in written["held_out"]] == [1, 2, 4]
    assert [row["bits_per_byte"] for row in written["held_out"]] == list(
        found.bits_per_byte.values()
    )
    assert written["compressors_bits_per_byte"] == found.compressors
    assert written["mean_loops_in_training"] == 2.0
    assert written["verdict"] == found.verdict()
    png = (tmp_path / "new" / "folder" / "loops.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    with (tmp_path / "new" / "folder" / "loops.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["nats_per_token"]) for row in rows] == pytest.approx(
        [result.nats_per_token for result in found.loops.values()]
    )


def test_loss_curve_is_written(run: Run) -> None:
    report.write_loss_curve(run)
    assert (run.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    with (run.folder / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["tokens"]) for row in rows] == [128, 256, 384]
    wanted = [metrics["loss"] for metrics in read_metrics(run.folder)]
    assert [float(row["loss"]) for row in rows] == pytest.approx(wanted)


def test_loss_curve_counts_the_tokens_of_every_step(run: Run, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step, tokens in ((0, 100), (1, 100), (2, 200)):
        log.write({"step": step, "tokens": tokens, "loss": 1.0})
    report.write_loss_curve(replace(run, folder=tmp_path))
    with (tmp_path / "loss.csv").open() as file:
        assert [float(row["tokens"]) for row in csv.DictReader(file)] == [100, 200, 400]


def test_loss_curve_needs_a_step(run: Run, tmp_path: Path) -> None:
    fresh = Run.create(tmp_path / "fresh", run.config)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: is missing"):
        report.write_loss_curve(fresh)
    (fresh.folder / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="no step has been logged yet"):
        report.write_loss_curve(fresh)
