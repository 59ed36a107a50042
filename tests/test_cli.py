"""The command line, called in this process: files, output and errors."""

import errno
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

import openmythos
from openmythos import OpenMythos, cli
from openmythos.cli import jobs
from openmythos.eval import harness
from openmythos.files import load_toml
from openmythos.model import presets
from openmythos.recipes import task_report
from openmythos.train.config import RunConfig
from openmythos.train.metrics import read_metrics
from openmythos.train.run import Run

STEPS = 3
SMALL = ["train.seq_len=32", f"train.num_steps={STEPS}", "model.dim=32"]
TINY = ["train", "--recipe", "tiny", "--data", "text", "--set", *SMALL]


class Result:
    """Exit code, standard output and standard error of a command."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


Call = Callable[..., Result]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    def run(*argv: str) -> Result:
        capsys.readouterr()
        try:
            code = cli.main(list(argv))
        except SystemExit as error:
            code = int(error.code or 0)
        return Result(code, *capsys.readouterr())

    return run


def write_text(folder: Path, files: int = 6, functions: int = 20) -> None:
    folder.mkdir()
    for number in range(files):
        lines = [f"def f{number}_{line}(x):\n    return {line} * x\n" for line in range(functions)]
        (folder / f"{number}.py").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text and a trained run, copied by the tests."""
    folder = tmp_path_factory.mktemp("cli")
    write_text(folder / "text")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert cli.main([*TINY, "--out", "run"]) == 0
    return folder


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def assert_refused(result: Result, *parts: str) -> None:
    """Exit code 2 and one line that names what is wrong."""
    assert result.code == 2
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1, result.err
    for part in parts:
        assert part in result.err
    assert "Traceback" not in result.out + result.err


def test_train_makes_a_run_folder(here: Path, call: Call) -> None:
    result = call(*TINY)
    assert result.code == 0, result.err
    folder = here / "runs" / "tiny-1"
    wanted = {"config.toml", "tokenizer.json", "tokens", "metrics.jsonl", "checkpoints"}
    wanted |= {"state.json", "machine.json", ".lock"}
    assert wanted | {"loss.png", "loss.csv"} == {path.name for path in folder.iterdir()}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003"]
    assert load_toml(RunConfig, folder / "config.toml").model.dim == 32
    assert [metrics["step"] for metrics in read_metrics(folder)] == [0, 1, 2]
    assert "openmythos generate runs/tiny-1" in result.out
    assert result.out.count("precision: ") == 1
    assert call(*TINY).code == 0
    assert (here / "runs" / "tiny-2").is_dir()


def test_train_into_a_named_folder_with_changes(here: Path, call: Call) -> None:
    result = call(*TINY, "model.halting=act", "train.optimizer=adamw", "--out", "other")
    assert result.code == 0, result.err
    config = Run.open(here / "other").config
    assert (config.model.halting.kind, config.train.optimizer.kind) == ("act", "adamw")


def test_resume_adds_steps(here: Path, call: Call) -> None:
    result = call("train", "--resume", "run", "--set", "train.num_steps=5")
    assert result.code == 0, result.err
    assert [metrics["step"] for metrics in read_metrics(here / "run")] == [0, 1, 2, 3, 4]
    assert Run.open(here / "run").config.train.num_steps == 5
    again = call("train", "--resume", "run")
    assert (again.code, "all 5 steps are done already" in again.out) == (0, True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_saves_and_resume_goes_on(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    original = jobs.train

    def interrupted(run: Run, **options: Any) -> Any:
        steps = original(run, **options)
        yield next(steps)
        os.kill(os.getpid(), number)
        try:
            yield from steps
        finally:
            steps.close()

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "train", interrupted)
        result = call(*TINY, "--out", "stopped")
    assert (result.code, result.err.splitlines()[-1]) == (128 + number, "interrupted")
    assert signal.getsignal(number) is before
    assert "stopped after step 1, checkpoint saved" in result.out
    assert "openmythos train --resume stopped" in result.out
    assert call("train", "--resume", "stopped").code == 0
    straight = [metrics["loss"] for metrics in read_metrics(here / "run")]
    assert [metrics["loss"] for metrics in read_metrics(here / "stopped")] == straight


def test_generate_continues_the_prompt(here: Path, call: Call) -> None:
    result = call("generate", "run", "--prompt", "def f", "--max-new-tokens", "8")
    assert result.code == 0, result.err
    assert result.out.startswith("def f")
    again = call("generate", "run", "--prompt", "def f", "--max-new-tokens", "8")
    assert again.out == result.out
    other = call("generate", "run", "--prompt", "def f", "--max-new-tokens", "8", "--seed", "1")
    assert other.out != result.out


def test_generate_prints_prompts_as_they_are(here: Path, call: Call) -> None:
    prompt = "[bold]x[/bold]\t:smile: [/nonsense] " + 30 * "long "
    result = call("generate", "run", "--prompt", prompt, "--max-new-tokens", "0")
    assert result.out == prompt + "\n"


def test_generate_with_more_loops_and_an_exit_rule(here: Path, call: Call) -> None:
    argv = ["generate", "run", "--num-loops", "9", "--max-new-tokens", "4", "--prompt", "def f"]
    rule = ["--exit-rule", "state_change", "--set", "exit_rule.threshold=100", "prefill_chunk=2"]
    assert "loops per token" not in call(*argv).out
    result = call(*argv, *rule)
    assert result.code == 0, result.err
    assert " of 9 loops per token]" in result.out


def test_eval_writes_its_report(here: Path, call: Call) -> None:
    result = call("eval", "run", "--num-loops", "1,2,4")
    assert result.code == 0, result.err
    assert "bits per byte" in result.out and "gzip-9" in result.out
    written = json.loads((here / "run" / "eval.json").read_text())
    assert [row["num_loops"] for row in written["held_out"]] == [1, 2, 4]
    assert written["verdict"] in " ".join(result.out.split())
    assert (here / "run" / "loops.png").is_file() and (here / "run" / "loops.csv").is_file()


def test_eval_of_other_text_leaves_the_held_out_figure(here: Path, call: Call) -> None:
    argv = ["eval", "run", "--num-loops", "2"]
    result = call(*argv)
    assert result.code == 0 and "hardly help" not in result.out
    kept = (here / "run" / "eval.json").read_bytes()
    for out in ([], ["--out", "elsewhere"]):
        assert call(*argv, "--data", "text/1.py", *out).code == 0
        folder = here / (out[1] if out else "run/eval/1.py")
        written = json.loads((folder / "eval.json").read_text())
        assert written["text"] == "text/1.py" and "held_out" not in written
        assert written["other_text"][0]["num_bytes"] == (here / "text" / "1.py").stat().st_size
        assert (folder / "loops.png").is_file()
    assert (here / "run" / "eval.json").read_bytes() == kept
    result = call(*argv, "--out", "text/1.py")
    assert_refused(result, "out = 'text/1.py': is not a folder")
    assert "bits per byte" not in result.out


def test_an_older_checkpoint_is_asked_for_by_its_step(here: Path, call: Call) -> None:
    shutil.copytree("run/checkpoints/step-00000003", "run/checkpoints/step-00000002")
    short = ["--max-new-tokens", "2"]
    assert call("generate", "run", "--step", "2", *short).code == 0
    assert call("eval", "run", "--step", "2", "--num-loops", "1").code == 0
    assert json.loads(Path("run/eval/step-00000002/eval.json").read_text())["step"] == 2
    assert not Path("run/eval.json").exists()
    for command in (["generate", *short], ["eval"], ["export", "--out", "x"]):
        result = call(command[0], "run", "--step", "9", *command[1:])
        assert_refused(result, "step = 9: must be one of 2, 3")


@pytest.mark.parametrize("name", presets.names())
def test_plan_of_every_preset(call: Call, name: str) -> None:
    result = call("plan", name)
    assert result.code == 0, result.err
    assert name in result.out


def test_plan_takes_changes(call: Call) -> None:
    plain = call("plan", "1b", "--num-loops", "4")
    changed = call("plan", "1b", "--num-loops", "4", "--set", "recurrent_feed_forward.top_k=2")
    assert changed.code == 0, changed.err
    assert changed.out != plain.out
    assert call("plan", "1b", "--batch", "3", "--context", "512").code == 0


def test_presets_are_listed(call: Call) -> None:
    result = call("presets")
    assert result.code == 0
    lines = result.out.splitlines()
    for name in presets.names():
        assert any(line.startswith(f"│ {name} ") for line in lines), name


def test_tokenizer_is_trained_and_used(here: Path, call: Call) -> None:
    argv = ["tokenizer", "--data", "text", "--vocab-size", "280", "--out", "bpe"]
    result = call(*argv)
    assert result.code == 0, result.err
    assert "bpe/tokenizer.json: 280 tokens" in result.out
    used = ["tokenizer.kind=file", "tokenizer.path=bpe", "--out", "other"]
    result = call(*TINY, *used)
    assert result.code == 0, result.err
    assert Run.open(here / "other").config.model.vocab_size == 280
    assert_refused(call(*argv), "bpe/tokenizer.json: exists already")


PREPARE = ["data", "prepare", "--data", "text", "--processes", "1", "--part-mb", "0.001"]


def test_prepared_folders_are_trained_on_by_their_weights(here: Path, call: Call) -> None:
    result = call(*PREPARE, "--tokenizer", "bytes", "--out", "a")
    assert result.code == 0, result.err
    assert "MB/s" in result.out and "a: " in result.out and " held-out tokens of " in result.out
    assert (
        call(*PREPARE[:3], "text/1.py", *PREPARE[4:], "--tokenizer", "bytes", "--out", "b").code
        == 0
    )
    assert call("data", "check", "a").code == 0
    argv = ["train", "--recipe", "tiny", "--data", "a", "b", "--out", "mixed", "--set", *SMALL]
    result = call(*argv, "data.weights=[3,1]")
    assert result.code == 0, result.err
    run = Run.open(here / "mixed")
    assert run.config.data.weights == (3, 1)
    assert not list((here / "mixed" / "tokens").glob("*/tokens-*.bin"))
    assert [len(found) for found in run.sources("held_out")] == [
        len(found)
        for folder in "ab"
        for found in Run.open(here / "mixed").sources("held_out")
        if str(here / folder) in str(found.files[0])
    ]
    # The run folder can be moved, the prepared folders cannot.
    (here / "mixed").rename(here / "moved")
    assert call("train", "--resume", "moved", "--set", "train.num_steps=4").code == 0
    assert call("eval", "moved", "--num-loops", "1").code == 0
    path = here / "b" / "train" / "tokens-00000.bin"
    path.write_bytes(path.read_bytes()[:-2])
    more = ["train", "--resume", "moved", "--set", "train.num_steps=5"]
    assert_refused(call(*more), f"{path}: is damaged")
    assert_refused(call("data", "check", "b"), "b/train/tokens-00000.bin: is damaged")
    new = ["train", "--recipe", "tiny", "--data", "b", "--out", "new", "--set", *SMALL]
    assert_refused(call(*new), f"{path}: is damaged")
    assert not Path("new").exists()
    (here / "b").rename(here / "c")
    assert_refused(call(*more), "b: the prepared folder that this run reads is missing")
    assert call("generate", "moved", "--max-new-tokens", "1").code == 0


def test_a_run_is_exported_for_transformers(here: Path, call: Call) -> None:
    """The card says what was trained, and the loss only once it was measured."""
    option = ("--format", "hf", "--license", "cc0-1.0")
    assert call("export", "run", "--out", "hub", *option).code == 0
    card = Path("hub/README.md").read_text()
    assert 'license: "cc0-1.0"' in card and f"| training steps | {STEPS} |" in card
    assert "Not measured for this checkpoint" in card and "dim = 32" in card
    assert call("export", "run", "--out", "asked", "--format", "lm-eval").code == 0
    rows = Path("asked/openmythos_held_out.jsonl").read_text().splitlines()
    held_out = Run.open(Path("run")).shards("held_out")
    assert len(rows) == held_out.read(0, len(held_out)).tolist().count(256) > 0
    assert all(json.loads(row)["text"].startswith("def f") for row in rows)
    names = {path.name for path in Path("hub").iterdir()}
    assert names >= {"modeling_openmythos.py", "tokenizer.json", "generation_config.json"}
    assert call("eval", "run", "--num-loops", "1,2", "--device", "cpu").code == 0
    assert call("export", "run", "--out", "hub2", *option).code == 0
    assert "| 2 | " in Path("hub2/README.md").read_text()


def test_a_run_is_exported_for_from_pretrained(here: Path, call: Call) -> None:
    assert call(*TINY, "train.save_every=1", "train.keep_checkpoints=3", "--out", "kept").code == 0
    assert call("export", "kept", "--out", "model").code == 0
    assert sorted(p.name for p in Path("model").iterdir()) == [
        *("config.json", "model.safetensors", "tokenizer.json")
    ]
    newest, tokens = Run.open(Path("kept")).load_model(), torch.arange(8)[None]
    exported = OpenMythos.from_pretrained("model").eval()
    assert torch.equal(exported(tokens).logits, newest(tokens).logits)
    assert call("export", "kept", "--out", "earlier", "--step", "1").code == 0
    earlier = OpenMythos.from_pretrained("earlier").eval()
    assert not torch.equal(earlier(tokens).logits, newest(tokens).logits)
    assert_refused(call("export", "kept", "--out", "model"), "out = 'model': exists already")
    assert_refused(call("export", "kept", "--out", "x", "--format", "gguf"), "format = 'gguf'")
    assert_refused(
        call("export", "kept", "--out", "x", "--step", "9"), "step = 9: must be one of 1"
    )


def test_a_task_is_learned_resumed_and_asked_like_text(here: Path, call: Call) -> None:
    small = ["model.dim=32", "train.num_steps=3", "train.batch_size=4", "data.max_hops=4"]
    made = call("train", "--recipe", "hops", "--device", "cpu", "--set", *small, "--out", "chains")
    assert made.code == 0, made.err
    assert "chains: k_hop, up to 4 hops" in made.out
    assert "openmythos eval chains" in made.out and "generate" not in made.out
    assert call("train", "--resume", "chains", "--set", "train.num_steps=5").code == 0
    assert [metrics["step"] for metrics in read_metrics(here / "chains")] == [0, 2, 4]
    assert read_metrics(here / "chains")[-1]["hops"] >= 2
    asked = call("eval", "chains", "--num-loops", "2,4")
    assert asked.code == 0 and "correct answers in %:" in asked.out
    rows = json.loads(Path("chains/eval.json").read_text())["accuracy"]
    assert {row["num_loops"] for row in rows} == {2, 4}
    assert {row["hops"] for row in rows} == {1, 2, 3, 4, 5, 6, 8, 10, 12}
    assert "chains" in call("runs", ".").out
    assert call("export", "chains", "--out", "hub", "--format", "hf").code == 0
    card = Path("hub/README.md").read_text()
    assert "| hops | " in card and 'kind = "k_hop"' in card
    assert call("export", "chains", "--out", "asked", "--format", "lm-eval").code == 0
    names = [f"openmythos_k_hop_{hops:03d}" for hops in (1, 2, 3, 4, 5, 6, 8)]
    assert sorted(path.stem for path in Path("asked").glob("*.yaml")) == names
    if not harness.INSTALLED:
        assert_refused(call("eval", "chains", "--tasks", "asked"), "lm-eval needs: pip install")
    assert call("export", "chains", "--out", "exported").code == 0
    assert sorted(path.name for path in Path("exported").iterdir()) == [
        *("config.json", "model.safetensors")
    ]
    assert_refused(call("generate", "chains"), "chains: was trained on a task, not on text")
    assert_refused(
        call("eval", "chains", "--data", "text"),
        "data = ('text',): must not be given: the run learned a task",
    )
    new = ["train", "--recipe", "hops", "--data", "text", "--out", "x"]
    assert_refused(call(*new), "data: recipe hops trains on a task, it reads no text")


def test_plan_says_what_fits_and_how(call: Call) -> None:
    fits = call("plan", "1b", "--gpus", "8", "--memory", "80", "--batch", "8")
    assert fits.code == 0 and "1b fits 8 devices with:" in fits.out
    assert "train.batch_size=64" in fits.out
    tight = call("plan", "1t", "--gpus", "2", "--memory", "1")
    assert tight.code == 0 and "1t does not fit 2 devices" in tight.out
    assert_refused(call("plan", "1b", "--gpus", "-1"), "gpus = -1")


DEMO = [
    'data.paths=["few"]',
    "tokenizer.vocab_size=300",
    "model.vocab_size=257",
    "model.dim=64",
    "model.recurrent_feed_forward.expert_dim=32",
    "model.feed_forward.hidden_dim=64",
    "train.num_steps=1",
    "train.batch_size=2",
    "train.seq_len=32",
]


def test_demo_trains_evaluates_and_samples(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(here / "few", files=4, functions=5)
    monkeypatch.setattr(task_report, "_HOPS", (0.1, 1.25))
    monkeypatch.setattr(task_report, "_LOOPS", (0.1, 0.2))
    result = call("demo", "--hops-steps", "2", "--set", *DEMO)
    assert result.code == 0, result.err
    assert "correct answers in %" in result.out and " 25 new" in result.out
    for name in ("checkpoints", "eval.json", "hops.png"):
        assert (here / "runs" / "demo-hops-1" / name).exists()
    folder = here / "runs" / "demo-1"
    for name in ("config.toml", "metrics.jsonl", "eval.json", "loss.png", "loops.png"):
        assert (folder / name).is_file()
    written = json.loads((folder / "eval.json").read_text())
    assert [row["num_loops"] for row in written["held_out"]] == [1, 2, 4, 8]
    assert "perplexity per token" in result.out and "xz-9" in result.out
    assert written["verdict"] in " ".join(result.out.split())
    samples = [line for line in result.out.splitlines() if line.startswith("--- ")]
    assert samples == ["--- 1 loop ---", "--- 8 loops ---"]
    assert result.out.count("def main(") == 2


NEW = ["train", "--recipe", "tiny", "--out", "new"]
WRONG: dict[str, tuple[list[str], list[str]]] = {
    "recipe": (["train", "--recipe", "tinny"], ["recipe = 'tinny'", "'tiny'", "demo"]),
    "key": ([*NEW, "--set", "train.num_step=3"], ["train.num_step", "'num_steps'"]),
    "room": ([*NEW, "--set", "trian.num_steps=3"], ["trian", "'train'"]),
    "kind": (
        [*NEW, "--set", "model.injection=lt"],
        ["model.injection", "'lt'", "'lti'", "concat"],
    ),
    "no value": ([*NEW, "--set", "train.num_steps"], ["train.num_steps"]),
    "top_k": (
        [*NEW, "--set", "model.recurrent_feed_forward.top_k=99"],
        ["model.recurrent_feed_forward.top_k = 99", "num_experts = 8"],
    ),
    "heads": (
        [*NEW, "--set", "model.attention=grouped_query", "model.dim=60"],
        ["num_heads = 8", "must divide dim = 60"],
    ),
    "zero steps": ([*NEW, "--set", "train.num_steps=0"], ["train.num_steps = 0", "at least 1"]),
    "model loops": ([*NEW, "--set", "model.num_loops=2.5"], ["model.num_loops", "2.5", "integer"]),
    "window": ([*NEW, "--set", "train.seq_len=512"], ["train.seq_len = 512", "context = 256"]),
    "empty corpus": ([*NEW, "--data", "empty"], ["empty", "no text found"]),
    "empty file": ([*NEW, "--data", "empty.txt"], ["empty.txt", "no text found"]),
    "binary file": ([*NEW, "--data", "binary"], ["binary: is not UTF-8 text"]),
    "missing data": ([*NEW, "--data", "nowhere"], ["nowhere: no such file or folder"]),
    "glob": ([*NEW, "--data", "no*where"], ["path = 'no*where'", "matches no file"]),
    "existing run": ([*TINY, "--out", "run"], ["run: exists already", "--out", "--resume run"]),
    "foreign folder": (["generate", "text"], ["text: is not the folder of a run or of a model"]),
    "foreign eval": (["eval", "nowhere"], ["nowhere: no such folder or file, nor a Hub id"]),
    "foreign resume": (["train", "--resume", "text"], ["text: is not the folder of a run"]),
    "resumed model": (
        ["train", "--resume", "run", "--set", "model.dim=64"],
        ["model: cannot change when a run is resumed"],
    ),
    "resumed data": (["train", "--resume", "run", "--data", "text"], ["data = ", "--resume"]),
    "resumed recipe": (["train", "--resume", "run", "--recipe", "tiny"], ["recipe = 'tiny'"]),
    "resumed out": (["train", "--resume", "run", "--out", "new"], ["out = 'new'", "--resume"]),
    "unbuildable model": ([*TINY, "model.dim=30", "--out", "new"], ["dim = 30"]),
    "negative loops": (["generate", "run", "--num-loops", "-1"], ["num_loops = -1", "at least 1"]),
    "zero loops": (["generate", "run", "--num-loops", "0"], ["num_loops = 0", "at least 1"]),
    "plan without loops": (["plan", "1b", "--num-loops", "0"], ["num_loops = 0", "at least 1"]),
    "top_k of the vocabulary": (
        ["generate", "run", "--top-k", "999"],
        ["top_k = 999", "at most 257"],
    ),
    "top_p": (["generate", "run", "--top-p", "1.5"], ["top_p = 1.5", "at most 1"]),
    "temperature": (["generate", "run", "--temperature", "-1"], ["temperature = -1"]),
    "exit rule": (
        ["generate", "run", "--exit-rule", "argmx"],
        ["exit_rule.kind", "'argmx'", "'argmax'"],
    ),
    "long prompt": (
        ["generate", "run", "--prompt", "x" * 300],
        ["prompt: 301 tokens", "context of 256"],
    ),
    "preset": (["plan", "1bb"], ["preset = '1bb': unknown preset, did you mean '1b'?"]),
    "loop list": (["eval", "run", "--num-loops", "1,x"], ["num_loops = '1,x'", "whole numbers"]),
    "no loops": (["eval", "run", "--num-loops", "0"], ["num_loops = '0'", ">= 1"]),
    "empty loops": (["eval", "run", "--num-loops", ""], ["num_loops = ''", "whole numbers"]),
    "half loops": (["eval", "run", "--num-loops", "2.5"], ["num_loops = '2.5'", ">= 1"]),
    "small vocabulary": (
        ["tokenizer", "--data", "text", "--vocab-size", "100", "--out", "bpe"],
        ["vocab_size = 100", "at least 257"],
    ),
    "weights of text": (
        [*NEW, "--data", "text", "--set", "data.weights=[1]"],
        ["data.weights = [1.0]", "only prepared folders", "data prepare"],
    ),
    "weights": (
        [*NEW, "--set", "data.weights=[1,2]"],
        ["data.weights = [1.0, 2.0]", "of the 1 paths"],
    ),
    "no prepared folder": (["data", "check", "text"], ["text: is not a prepared folder"]),
    "prepare into text": (
        ["data", "prepare", "--data", "text", "--tokenizer", "bytes", "--out", "text"],
        ["text: exists already"],
    ),
    "huge vocabulary": (
        ["tokenizer", "--data", "text", "--vocab-size", f"{10**20}", "--out", "bpe"],
        ["vocab_size = 1000", "at most 2147483647"],
    ),
    "endless limit": ([*NEW, "--set", "data.limit_mb=inf"], ["data.limit_mb = inf", "at most"]),
    "endless part": (
        [
            "data",
            "prepare",
            "--data",
            "text",
            "--tokenizer",
            "bytes",
            "--out",
            "new",
            "--part-mb",
            "inf",
        ],
        ["part_mb = inf", "at most"],
    ),
    "seed": ([*NEW, "--set", f"train.seed={10**20}"], ["train.seed = 1000", "2**63 - 1"]),
    "nested": ([*NEW, "--set", "train.seed=" + 3000 * "["], ["[[[...: is nested too deeply"]),
    "endless context": (
        ["plan", "tiny", "--context", f"1{400 * '0'}"],
        ["context = 1000", "0...: must be an integer, at least 1 and at most 2147483647"],
    ),
    "plan vocabulary": (["plan", "tiny", "--set", f"vocab_size={10**20}"], ["vocab_size = 1000"]),
    "plan layers": (
        ["plan", "tiny", "--set", "prelude_layers=100000"],
        ["prelude_layers = 100000", "at most 1024"],
    ),
    "no memory": (["plan", "tiny", "--gpus", "1", "--memory", "-5"], ["memory = -5.0", "above 0"]),
    "endless memory": (["plan", "tiny", "--gpus", "1", "--memory", "inf"], ["memory = inf"]),
    "plan gpus": (["plan", "tiny", "--gpus", f"{10**9}"], ["gpus = 1000000000", "at most"]),
    "tokenizer of prepared text": (
        [*NEW, "--data", "prepared", "--set", "tokenizer.kind=bpe"],
        ["tokenizer: cannot be chosen, a prepared folder has its own"],
    ),
    "tokenizer into a file": (
        ["tokenizer", "--data", "text", "--out", "empty.txt"],
        ["out = 'empty.txt': empty.txt is not a folder"],
    ),
    "prompt of bytes": (["generate", "run", "--prompt", "\udcff"], ["prompt: is not UTF-8 text"]),
    "no study": (["study"], ["study: needs a name; known: depth-extrapolation"]),
    "a report of changed runs": (
        ["study", "bounded-state", "--report-only", "--quick"],
        ["report_only = True: cannot be combined with --quick or --set"],
    ),
    "a report of no runs": (
        ["study", "bounded-state", "--report-only", "--out", "nowhere"],
        ["nowhere/bounded-state/results.json: is not there: no runs to judge"],
    ),
    "missing tokenizer": (
        ["data", "prepare", "--data", "text", "--tokenizer", "nope", "--out", "new"],
        ["error: nope: cannot be read: No such file"],
    ),
    "plan context": (["plan", "tiny", "--context", "-1"], ["context", "-1"]),
}


@pytest.mark.parametrize("argv_and_parts", WRONG.values(), ids=WRONG.keys())
def test_wrong_input_gets_one_line(
    here: Path, call: Call, argv_and_parts: tuple[list[str], list[str]]
) -> None:
    (here / "empty").mkdir()
    (here / "prepared").mkdir()
    (here / "prepared" / "prepared.json").touch()
    (here / "empty.txt").write_text("")
    (here / "binary").write_bytes(bytes(range(256)))
    argv, parts = argv_and_parts
    assert_refused(call(*argv), *parts)
    assert not (here / "new").exists()
    assert not (here / "bpe").exists()


@pytest.mark.parametrize(
    "name", ["training.json", "shard-00001-model-00001-of-00001.safetensors", "config.json"]
)
def test_damaged_checkpoint_is_named(here: Path, call: Call, name: str) -> None:
    path = Path("run/checkpoints/step-00000003") / name
    path.write_bytes(path.read_bytes()[:20])
    assert_refused(call("train", "--resume", "run"), str(path))
    assert_refused(call("generate", "run"), str(path))
    assert_refused(call("eval", "run"), str(path))


@pytest.mark.parametrize("name", ["config.toml", "tokenizer.json"])
def test_damaged_run_is_named(here: Path, call: Call, name: str) -> None:
    (here / "run" / name).write_text("{nonsense")
    assert_refused(call("generate", "run"), f"run/{name}")


def test_failed_resume_leaves_the_config_alone(here: Path, call: Call) -> None:
    before = (here / "run" / "config.toml").read_bytes()
    argv = ["train", "--resume", "run", "--set", "train.num_steps=9"]
    changes = {"model.dim=64": "model", "train.optimizer=adamw": "optimizer"}
    for change, part in (changes | {"train.device=nope": "device"}).items():
        assert_refused(call(*argv, change), part)
    assert (here / "run" / "config.toml").read_bytes() == before


def test_two_trainings_take_the_next_free_names(here: Path, call: Call) -> None:
    for taken in ("tiny-1", "tiny-3"):
        (here / "runs" / taken).mkdir(parents=True)
    result = call(*TINY, "train.num_steps=1", "train.optimizer=adamw")
    assert result.code == 0, result.err
    assert_refused(call(*TINY, "model.dim=30"), "dim = 30")
    assert sorted(p.name for p in (here / "runs").iterdir()) == ["tiny-1", "tiny-2", "tiny-3"]


def test_what_is_next_suits_the_text_and_can_be_pasted(here: Path, call: Call) -> None:
    argv = [*TINY, "train.num_steps=1", "train.optimizer=adamw", "--out", "sp ace/r 1"]
    assert "openmythos generate 'sp ace/r 1' --prompt='def f0_0(x):'\n" in call(*argv).out


def test_a_diverged_run_says_so_and_fails(here: Path, call: Call) -> None:
    changes = ["train.optimizer=adamw", "train.optimizer.lr=1e30", "train.num_steps=4"]
    result = call(*TINY, *changes, "--out", "bad")
    assert (result.code, "Next:" in result.out) == (1, False)
    assert result.out.count("the loss or its gradient is not finite") == 1
    assert result.err.startswith("error: loss not finite since step ")
    assert result.err.count("\n") == 1 and "a bug" not in result.err
    result = call("eval", "bad", "--num-loops", "1,2")
    assert "Looping helps" not in result.out and "Traceback" not in result.err


def test_full_disk_is_no_fault_of_the_user(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(*_args: object, **_kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(HuggingFaceStorageWriter, "write_data", no_space)
        result = call("train", "--resume", "run", "--set", "train.num_steps=4")
    assert result.code == 1
    assert "No space left on device" in result.err.splitlines()[-1]
    assert "Traceback" not in result.out + result.err
    assert call("generate", "run", "--max-new-tokens", "1").code == 0


def test_keyboard_interrupt_is_not_a_crash(
    here: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("openmythos.train.run.open_data", interrupted)
    result = call("tokenizer", "--data", "text")
    assert (result.code, result.err) == (130, "interrupted\n")


FLAGS = {
    "demo": ["--out", "--set", "--hops-steps"],
    "train": ["--recipe", "--data", "--set", "--out", "--resume"],
    "generate": [
        *("--prompt", "--num-loops", "--max-new-tokens", "--temperature", "--top-k", "--top-p"),
        *("--min-p", "--seed", "--exit-rule", "--set"),
    ],
    "eval": ["--data", "--num-loops", "--out"],
    "plan": ["--context", "--batch", "--num-loops", "--set"],
    "presets": [],
    "study": ["--list", "--seeds", "--quick", "--out", "--processes", "--report-only", "--set"],
    "tokenizer": ["--data", "--vocab-size", "--out"],
    "data": ["prepare", "check"],
}


@pytest.mark.parametrize("command", FLAGS)
def test_help_of_every_command(call: Call, command: str) -> None:
    result = call(command, "--help")
    assert result.code == 0
    for flag in FLAGS[command]:
        assert flag in result.out


def test_help_names_a_value_and_its_default_once(call: Call) -> None:
    for command in FLAGS:
        out = call(command, "--help").out
        assert "STR" not in out and "{None}" not in out and "''" not in out, command
        assert out.count("(default: runs/") <= 1, command
    assert "--set KEY=VALUE" in call("train", "--help").out


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (RuntimeError("tensor\nframes"), 1, "RuntimeError: tensor; this is a bug, OPENMYTHOS_DEB"),
        (OverflowError("too large"), 1, "OverflowError: too large; this is a bug"),
        (AssertionError(), 1, "AssertionError: ; this is a bug"),
        (RecursionError("depth"), 1, "RecursionError: depth; this is a bug"),
        (MemoryError(), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes"), 1, "out of memory:"),
    ],
)
def test_an_error_nobody_foresaw_is_one_line(
    call: Call, monkeypatch: pytest.MonkeyPatch, error: Exception, code: int, said: str
) -> None:
    def failing(_self: object) -> None:
        raise error

    monkeypatch.setattr(cli.Presets, "run", failing)
    result = call("presets")
    assert (result.code, result.err.count("\n")) == (code, 1)
    assert result.err.startswith(f"error: {said}")
    monkeypatch.setenv("OPENMYTHOS_DEBUG", "1")
    assert "in failing" in call("presets").err


def test_a_reader_that_leaves_is_no_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_self: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(cli.Presets, "run", broken)
    result = call("presets")
    assert (result.code, result.out, result.err) == (141, "", "")


def test_version(call: Call) -> None:
    assert call("--version").out == f"openmythos {openmythos.__version__}\n"


def test_help_names_every_command(call: Call) -> None:
    result = call("--help")
    assert result.code == 0
    for command in FLAGS:
        assert command in result.out


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        ([], "demo"),
        (["nonsense"], "nonsense"),
        (["train", "--nonsense", "3"], "--nonsense"),
        (["generate", "run", "--num-loops", "2.5"], "--num-loops"),
        (["generate", "run", "--num-loops", "2.5"], "'2.5' is not a number"),
        (
            ["generate"],
            "generate: needs MODEL (run folder, model folder, GGUF file or Hub",
        ),
        (["export"], "export: needs MODEL (run folder, model folder, GGUF file or Hub"),
        (["plan"], "plan: needs PRESET"),
        (["trian"], "unknown command 'trian', did you mean 'train'? known: data, demo"),
        (["train", "--reume", "x"], "Unrecognized options: --reume, x, did you mean --resume?"),
        (["data", "nope"], "nope; Available subcommands: prepare, check"),
        (["generate", "run", "--prompt", "-x"], "--prompt=-x"),
        (["generate", "run", "--prompt"], "--prompt: needs a value"),
        (["train", "--resume", ""], "--resume: must not be empty"),
        (["train", "--resume="], "--resume: must not be empty"),
        (["train", "--data", ""], "--data: must not be empty"),
        (["generate", ""], "argument 2: must not be empty"),
        (["train", "--recipe", "tiny", "--set"], "--set: must be followed by"),
        (["train", "--data", "--out", "o"], "--data: must be followed by"),
    ],
)
@pytest.mark.parametrize("utf8", [True, False])
def test_wrong_arguments_are_explained(
    call: Call, monkeypatch: pytest.MonkeyPatch, argv: list[str], part: str, utf8: bool
) -> None:
    monkeypatch.setattr("tyro._fmtlib._FORCE_UTF8_BOXES", utf8)
    result = call(*argv)
    assert result.code == 2
    assert part.lower() in result.err.lower()
    assert result.err.startswith("error: ") and result.err.count("\n") == 1
    assert "Traceback" not in result.out + result.err


def test_studies_are_listed_and_unknown_ones_refused(call: Call) -> None:
    assert "depth-extrapolation: A looped model" in call("study", "--list").out
    for argv in (["study", "depth"], ["study"], ["study", "depth-extrapolation", "--seeds", "0"]):
        result = call(*argv)
        assert result.code == 2 and result.err.count("\n") == 1
