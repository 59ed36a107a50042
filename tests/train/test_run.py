"""Run folders: resumed equals uninterrupted, and what happens when a disk or a file fails."""

import errno
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from variants import tiny_config

from openmythos import machine
from openmythos.config import ConfigError, apply_overrides
from openmythos.data.prepare import prepare
from openmythos.data.prepared import Preparation
from openmythos.data.tokenizer import BPE, ByteTokenizer
from openmythos.files import load_toml, save_toml
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.initial_state import NormalState
from openmythos.recurrence.loop_sampling import FixedLoops, PoissonLoops
from openmythos.train import checkpoint
from openmythos.train.checkpoint import checkpoint_at, list_checkpoints
from openmythos.train.config import RunConfig, TextData, TrainConfig
from openmythos.train.guards import NoSpikes, Rollback
from openmythos.train.metrics import MetricsLog, read_metrics
from openmythos.train.optim import AdamW, Muon
from openmythos.train.run import Run, train

STEPS = 6


def config_of(corpus: Path, **changes: Any) -> RunConfig:
    parts = {"vocab_size": 257, "context": 32} | changes.pop("model", {})
    usual: dict[str, Any] = {
        "num_steps": STEPS,
        "batch_size": 4,
        "seq_len": 32,
        "loops": PoissonLoops(mean_loops=2.0, max_loops=4),
        "save_every": 2,
        "precision": "fp32",
    }
    return RunConfig(
        model=tiny_config(**parts),
        data=TextData(paths=(str(corpus),)),
        train=TrainConfig(**(usual | changes)),
    )


def write_corpus(folder: Path) -> Path:
    folder.mkdir()
    rng = random.Random(0)
    words = ("loop", "state", "encoded", "halt", "router", "expert", "decay", "coda", "token")
    for number in range(8):
        text = " ".join(rng.choice(words) for _ in range(150))
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write_corpus(tmp_path / "text")


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of 4 steps with checkpoints after 2 and 4, copied by the tests."""
    folder = tmp_path_factory.mktemp("finished")
    run = Run.create(folder / "run", config_of(write_corpus(folder / "text"), num_steps=4))
    list(train(run))
    return run


@pytest.fixture
def done(finished: Run, tmp_path: Path) -> Run:
    """A copy of the finished run, to damage."""
    return copy_of(finished, tmp_path / "done")


def longer(run: Run, **changes: Any) -> Run:
    """The run with two more steps, and other changes to its training."""
    train_config = replace(run.config.train, num_steps=run.config.train.num_steps + 2, **changes)
    return replace(run, config=replace(run.config, train=train_config))


@pytest.fixture
def run(tmp_path: Path, corpus: Path) -> Run:
    return Run.create(tmp_path / "run", config_of(corpus))


def weights(run: Run) -> dict[str, torch.Tensor]:
    return run.load_model().state_dict()


def steps_of(run: Run) -> list[float]:
    return [metrics["step"] for metrics in read_metrics(run.folder)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


VARIANTS: list[dict[str, Any]] = [
    {"optimizer": AdamW()},
    {"optimizer": Muon(), "model": {"state_init": NormalState()}},
    {"model": {"halting": ACT()}, "micro_batch_size": 2},
    # Few shapes, and small: a CPU compiles its bf16 kernels for each, or emulates them.
    {
        "precision": "bf16",
        "loops": FixedLoops(mean_loops=2),
        "backprop_loops": 1,
        "mask_documents": True,
        "seq_len": 16,
        "batch_size": 2,
    },
]


@pytest.mark.parametrize(
    ("changes", "stop"),
    [(changes, 3 - number % 2) for number, changes in enumerate(VARIANTS)],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else f"after {x}, saved every 2",
)
def test_resumed_equals_uninterrupted(
    tmp_path: Path, corpus: Path, changes: dict[str, Any], stop: int
) -> None:
    config = config_of(corpus, **changes)
    straight = Run.create(tmp_path / "straight", config)
    wanted = [(m.loss, m.total_loss, m.gradient_norm, m.max_violation) for m in train(straight)]
    broken = Run.create(tmp_path / "broken", config)
    steps = train(broken)
    found = [next(steps) for _ in range(stop)]
    steps.close()
    assert checkpoint_at(broken.folder).name == f"step-{stop:08d}"
    torch.manual_seed(stop)  # the global generator is not what the steps depend on
    found += list(train(Run.open(broken.folder), resume=True))
    assert [(m.loss, m.total_loss, m.gradient_norm, m.max_violation) for m in found] == wanted
    first, second = weights(straight), weights(broken)
    assert first.keys() == second.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
    assert steps_of(broken) == list(range(STEPS))


def test_a_resumed_run_keeps_the_precision_that_auto_was(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(corpus, precision="auto", optimizer=Muon())
    monkeypatch.setattr(machine, "bf16_is_native", lambda _device=None: False)
    wanted = [m.loss for m in train(Run.create(tmp_path / "straight", config))]
    lines: list[str] = []
    run = Run.create(tmp_path / "broken", config)
    steps = train(run, on_message=lines.append)
    found = [next(steps).loss for _ in range(3)]
    steps.close()
    monkeypatch.setattr(machine, "bf16_is_native", lambda _device=None: True)
    found += [m.loss for m in train(Run.open(run.folder), resume=True, on_message=lines.append)]
    assert found == wanted
    assert lines == [
        "precision: fp32 on cpu, the fast one here",
        "precision: fp32 on cpu, as the run began",
    ]
    assert json.loads((run.folder / "machine.json").read_text())["precision"]["model"] == "fp32"


@pytest.mark.parametrize(
    ("trained", "asked", "found"),
    [
        ("auto", "auto", "bf16"),
        ("fp32", "auto", "fp32"),
        ("bf16", "auto", "bf16"),
        ("fp32", "bf16", "bf16"),
        ("auto", "fp32", "fp32"),
    ],
)
def test_a_model_is_used_in_what_the_device_has(
    run: Run, monkeypatch: pytest.MonkeyPatch, trained: str, asked: str, found: str
) -> None:
    monkeypatch.setattr(machine, "bf16_is_native", lambda _device: True)
    config = replace(run.config, train=replace(run.config.train, precision=trained))
    assert replace(run, config=config).choose_precision(asked, torch.device("cpu")) == found


def test_a_spike_takes_the_run_back_and_on_with_other_data(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def jumpy(rule: Rollback, recent: Sequence[float], loss: float) -> bool:
        """True for about every third loss, as a function of what the real rule sees."""
        return len(recent) == rule.window and round(1e6 * (loss + sum(recent))) % 3 == 0

    monkeypatch.setattr(Rollback, "is_spike", jumpy)
    config = config_of(
        corpus,
        **{"num_steps": 12, "save_every": 2, "spikes": Rollback(window=3, at_most=2)},
        **{"batch_size": 2, "seq_len": 16, "loops": FixedLoops(mean_loops=1)},
        model={"dim": 16, "prelude_layers": 0, "coda_layers": 0},
    )
    run = Run.create(tmp_path / "run", config)
    calm = Run.create(
        tmp_path / "calm", replace(config, train=replace(config.train, spikes=NoSpikes()))
    )
    usual = [metrics.loss for metrics in train(calm)]
    found = list(train(run))
    assert [metrics.rollbacks for metrics in found][-1] == 2
    back = [n for n in range(1, len(found)) if found[n].step <= found[n - 1].step]
    assert len(back) == 2
    first = back[0]
    assert [metrics.loss for metrics in found[:first]] == usual[:first]  # the spike is the last
    assert found[first].step % 2 == 0 and found[first].step > 0
    assert found[first].loss != usual[found[first].step]
    assert steps_of(run) == list(range(12))
    logged = [metrics["loss"] for metrics in read_metrics(run.folder)]
    assert logged == list({metrics.step: metrics.loss for metrics in found}.values())

    # Killed and resumed from the checkpoint before: the same jumps, the same end.
    for stop in (first, first + 1, back[1] + 1):
        broken = Run.create(tmp_path / f"broken-{stop}", config)
        steps = train(broken)
        for _ in range(stop):
            next(steps)
        kept = copy_of(broken, tmp_path / f"kept-{stop}")
        steps.close()
        list(train(kept, resume=bool(list_checkpoints(kept.folder))))
        assert [metrics["loss"] for metrics in read_metrics(kept.folder)] == logged


def copy_of(run: Run, folder: Path) -> Run:
    """The run as it lies on the disk: what a killed process leaves."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns(".step-*"))
    return Run.open(folder)


def test_resume_after_a_crash_repeats_the_lost_steps(tmp_path: Path, corpus: Path) -> None:
    straight = Run.create(tmp_path / "straight", config_of(corpus))
    wanted = [metrics.loss for metrics in train(straight)]
    run = Run.create(tmp_path / "run", config_of(corpus, save_every=4))
    losses = [metrics.loss for metrics in train(run)][:4]
    # As if the process had died after step 6's line, before its checkpoint.
    for folder in list_checkpoints(run.folder)[1:]:
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
    losses += [metrics.loss for metrics in train(run, resume=True)]
    assert losses == wanted
    assert steps_of(run) == list(range(STEPS))


def test_closing_before_the_first_step_saves_nothing(run: Run) -> None:
    steps = train(run)
    steps.close()
    assert list_checkpoints(run.folder) == []
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        run.load_model()


def test_a_run_that_ended_before_its_first_checkpoint_is_resumed_from_its_start(
    run: Run, tmp_path: Path
) -> None:
    steps = train(run)
    wanted = [next(steps).loss, next(steps).loss]
    killed = copy_of(run, tmp_path / "killed")
    steps.close()
    shutil.rmtree(killed.folder / "checkpoints", ignore_errors=True)
    assert steps_of(killed) == [0, 1]
    said: list[str] = []
    found = [metrics.loss for metrics in train(killed, resume=True, on_message=said.append)]
    assert f"{killed.folder}: no checkpoint yet, training starts at step 0" in said
    assert (len(found), found[:2]) == (STEPS, wanted)
    assert steps_of(killed) == list(range(STEPS))


def test_a_run_is_trained_by_one_process_at_a_time(done: Run) -> None:
    more = longer(done)
    steps = train(more, resume=True)
    next(steps)
    refusal = rf"done: process {os.getpid()} is training it \(since 2.*\)"
    for resume in (True, False):
        with pytest.raises(ConfigError, match=refusal):
            train(more, resume=resume)
    done.load_model()  # readers need not wait
    list(steps)
    assert steps_of(done) == list(range(6))
    assert list(train(more, resume=True)) == []


def test_a_dropped_iterator_lets_another_train(done: Run) -> None:
    more = longer(done)
    train(more, resume=True).close()
    steps = train(more, resume=True)
    next(steps)
    del steps
    assert [metrics.step for metrics in train(more, resume=True)] == [5]


def test_a_reader_follows_a_checkpoint_that_is_replaced_meanwhile(
    done: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = checkpoint.verify

    def pruned(path: Path, *ranks: int) -> None:
        if path.name == "step-00000004":
            path.rename(path.with_name("step-00000006"))
        original(path, *ranks)

    monkeypatch.setattr(checkpoint, "verify", pruned)
    assert done.load_model().config == done.config.model


def test_only_folders_named_like_checkpoints_are_checkpoints(done: Run) -> None:
    folder = done.folder / "checkpoints"
    copies = ["step-00000002.best", "step-00000004.bak", "step-5", "astep-00000002"]
    for name in copies:
        shutil.copytree(folder / "step-00000002", folder / name)
    (folder / "step-00000006").write_text("a file")
    (folder / "step-00000009").mkdir()
    assert [path.name for path in list_checkpoints(done.folder)] == [
        *("step-00000002", "step-00000004")
    ]
    list(train(longer(done), resume=True))
    left = ["step-00000004", "step-00000006"]
    assert [path.name for path in list_checkpoints(done.folder)] == left
    assert set(copies) < set(names(folder))


def test_a_refused_resume_leaves_the_config_and_a_whole_one_writes_it(done: Run) -> None:
    before = (done.folder / "config.toml").read_bytes()
    with pytest.raises(ConfigError, match=r"train.optimizer.kind = 'muon': .* trained with adamw"):
        train(longer(done, optimizer=Muon()), resume=True)
    path = done.folder / "checkpoints" / "step-00000004" / "training.json"
    kept = path.read_bytes()
    path.write_bytes(b"{}")
    with pytest.raises(ConfigError, match="is damaged"):
        train(longer(done), resume=True)
    path.write_bytes(kept)
    assert (done.folder / "config.toml").read_bytes() == before
    train(longer(done), resume=True).close()
    assert Run.open(done.folder).config.train.num_steps == 6


def test_a_log_is_not_needed_to_go_on(done: Run) -> None:
    (done.folder / "metrics.jsonl").unlink()
    assert [metrics.step for metrics in train(longer(done), resume=True)] == [4, 5]
    assert steps_of(done) == [4, 5]


def test_the_whole_checkpoint_before_a_damaged_one_is_named(done: Run) -> None:
    newest = checkpoint_at(done.folder)
    shard = next(newest.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:1000])
    damage = rf"{shard}: is damaged.*; delete {newest} to go on from step-00000002$"
    for use in (lambda: train(longer(done), resume=True), done.load_model):
        with pytest.raises(ConfigError, match=damage):
            use()
    done.load_model(step=2)
    with pytest.raises(ConfigError, match="step = 3: must be one of 2, 4"):
        done.load_model(step=3)
    (newest.with_name("step-00000002") / "config.json").unlink()
    with pytest.raises(ConfigError, match=rf"is that of|{shard}: is damaged[^;]*$"):
        done.load_model()


def test_checksums_that_leave_a_file_out_are_damaged(done: Run) -> None:
    path = checkpoint_at(done.folder) / "checksums.json"
    for kept in ((), ("config.json", "training.json"), ("config.json",)):
        sums = json.loads(path.read_text())
        path.write_text(json.dumps({name: sums[name] for name in kept}))
        with pytest.raises(ConfigError, match=r"checksums\.json: is damaged, it has no "):
            done.load_model()
        path.write_text(json.dumps(sums))


@pytest.mark.parametrize("recent", [3, ["x"]])
def test_training_json_that_cannot_be_read_is_named(done: Run, recent: Any) -> None:
    folder = checkpoint_at(done.folder)
    path, sums = folder / "training.json", json.loads((folder / "checksums.json").read_text())
    saved = json.loads(path.read_text())
    path.write_text(json.dumps(saved | {"recent": recent}))
    sums["training.json"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "checksums.json").write_text(json.dumps(sums))
    with pytest.raises(ConfigError, match=r"training\.json: recent"):
        train(longer(done), resume=True)


def test_resuming_a_finished_run_does_nothing_and_more_steps_go_on(run: Run) -> None:
    list(train(run))
    assert list(train(run, resume=True)) == []
    assert steps_of(run) == list(range(STEPS))
    longer = replace(run, config=replace(run.config, train=replace(run.config.train, num_steps=8)))
    assert [metrics.step for metrics in train(longer, resume=True)] == [6, 7]
    assert steps_of(run) == list(range(8))


def no_space(*_args: object, **_kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_writing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(HuggingFaceStorageWriter, "write_data", no_space)


def fail_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(os, "replace", no_space)


def fail_rename(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Path, "rename", no_space)


def fail_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint.files, "sync_folder", no_space)


@pytest.mark.parametrize("fail", [fail_writing, fail_weights, fail_rename, fail_sync])
def test_full_disk_leaves_the_former_checkpoint(
    done: Run, monkeypatch: pytest.MonkeyPatch, fail: Callable[[pytest.MonkeyPatch], None]
) -> None:
    folder, more = done.folder / "checkpoints", longer(done)
    kept = ["step-00000002", "step-00000004"]
    before = {path: path.read_bytes() for name in kept for path in (folder / name).iterdir()}
    assert len(before) == 8
    steps = train(more, resume=True)
    next(steps)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail(patch)
        list(steps)
    assert names(folder) == kept
    assert {path: path.read_bytes() for path in before} == before
    done.load_model()
    assert [metrics.step for metrics in train(more, resume=True)] == [4, 5]


def test_interrupted_creation_is_not_a_run(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        fail_weights(patch)
        Run.create(tmp_path / "run", config_of(corpus))
    with pytest.raises(ConfigError, match="is not the folder of a run"):
        Run.open(tmp_path / "run")


FILES = [
    "config.json",
    "training.json",
    "shard-00001-model-00001-of-00001.safetensors",
    "checksums.json",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [b"", b"nonsense", None])
def test_damaged_file_of_a_checkpoint_is_named(done: Run, name: str, damage: bytes | None) -> None:
    path = checkpoint_at(done.folder) / name
    path.write_bytes(path.read_bytes()[:-20] if damage is None else damage)
    for use in (lambda: train(done, resume=True), done.load_model):
        with pytest.raises(ConfigError) as caught:
            use()
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FILES)
def test_missing_file_of_a_checkpoint_is_named(done: Run, name: str) -> None:
    path = checkpoint_at(done.folder) / name
    path.unlink()
    for use in (lambda: train(done, resume=True), done.load_model):
        with pytest.raises(ConfigError) as caught:
            use()
        assert str(path) in str(caught.value)


def test_checkpoint_of_another_model_is_refused(done: Run) -> None:
    other = replace(done.config, model=replace(done.config.model, dim=48))
    with pytest.raises(ConfigError, match=r"step-00000004: does not fit this model: Size"):
        train(replace(done, config=other), resume=True)


@pytest.mark.parametrize("kinds", [(AdamW(), Muon()), (Muon(), AdamW())])
def test_checkpoint_of_another_optimizer_is_refused(
    tmp_path: Path, corpus: Path, kinds: tuple[Any, Any]
) -> None:
    run = Run.create(tmp_path / "run", config_of(corpus, optimizer=kinds[0], num_steps=2))
    list(train(run))
    other = replace(run.config, train=replace(run.config.train, optimizer=kinds[1]))
    refusal = rf"optimizer.kind = '{kinds[1].kind}': the run was trained with {kinds[0].kind}"
    with pytest.raises(ConfigError, match=refusal):
        train(replace(run, config=other), resume=True)
    # A config.toml that was changed by hand.
    save_toml(other, run.folder / "config.toml")
    with pytest.raises(ConfigError, match=r"step-00000002: optimizer: has no place for the saved"):
        train(replace(run, config=other), resume=True)


def test_every_so_many_steps_a_checkpoint_stays(tmp_path: Path, corpus: Path) -> None:
    config = config_of(corpus, keep_checkpoints=1, keep_every=4, save_every=1)
    run = Run.create(tmp_path / "run", config)
    list(train(run))
    kept = [int(path.name.removeprefix("step-")) for path in list_checkpoints(run.folder)]
    assert kept == [4, 6]


def test_training_abandons_the_step_in_which_it_is_asked_to_stop(run: Run) -> None:
    asked, seen = [], []
    for metrics in train(run, stopping=lambda: 0 in asked):
        seen.append(metrics.step)
        if metrics.step == 2:
            asked.append(0)
    assert seen == [0, 1, 2]
    assert checkpoint_at(run.folder).name == "step-00000003"


def test_a_step_is_abandoned_anywhere_and_made_again_exactly(
    tmp_path: Path, corpus: Path, run: Run
) -> None:
    """The trainer asks in every module of the forward and the backward pass."""
    straight = [(metrics.step, metrics.loss) for metrics in train(run)]
    other = Run.create(tmp_path / "other", run.config)
    asked = 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        # Later each time, so that it is somewhere else.
        return asked == allowed

    seen: list[tuple[int, float]] = []
    allowed = 0
    while len(seen) < len(straight):
        asked, allowed = 0, allowed + 61
        done = bool(list_checkpoints(other.folder))
        seen += [
            (metrics.step, metrics.loss) for metrics in train(other, resume=done, stopping=stopping)
        ]
        assert allowed < 2000
    assert seen == straight
    assert torch.equal(run.load_model().embed.weight, other.load_model().embed.weight)


@pytest.mark.parametrize(("keep", "left"), [(2, [4, 6]), (9, [2, 4, 6])])
def test_only_the_newest_checkpoints_are_kept(
    tmp_path: Path, corpus: Path, keep: int, left: list[int]
) -> None:
    run = Run.create(tmp_path / "run", config_of(corpus, keep_checkpoints=keep))
    list(train(run))
    assert names(run.folder / "checkpoints") == [f"step-{step:08d}" for step in left]


def test_folder_that_exists_is_refused(tmp_path: Path, corpus: Path, run: Run) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        Run.create(run.folder, config_of(corpus))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="exists already"):
        Run.create(tmp_path / "file", config_of(corpus))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("")
    with pytest.raises(ConfigError, match=r"exists already; choose another --out$"):
        Run.create(tmp_path / "other", config_of(corpus))
    assert names(tmp_path / "other") == ["notes.txt"]


def test_folders_that_are_empty_are_filled(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also links, mount points and ".", none of which can be replaced."""
    for name in ("here", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.chdir(tmp_path / "here")
    for folder in (tmp_path / "link", Path(".")):
        made = Run.create(folder, config_of(corpus))
        assert names(folder) == [".lock", "config.toml", "tokenizer.json", "tokens"]
        assert made.config == Run.open(folder).config
    assert (tmp_path / "link").is_symlink()


def test_what_a_killed_process_left_half_made_is_made_again(tmp_path: Path, corpus: Path) -> None:
    folder = tmp_path / "run"
    (folder / ".unfinished" / "tokens").mkdir(parents=True)
    (folder / "tokens").mkdir()
    (folder / ".lock").write_text("")
    Run.create(folder, config_of(corpus))
    assert names(folder) == [".lock", "config.toml", "tokenizer.json", "tokens"]


def test_two_that_make_one_folder_are_told_apart(tmp_path: Path, corpus: Path) -> None:
    def second(stage: str, _done: int) -> None:
        with pytest.raises(ConfigError, match="another process is making"):
            Run.create(tmp_path / "run", config_of(corpus))

    made = Run.create(tmp_path / "run", config_of(corpus), second)
    assert Run.open(tmp_path / "run").config == made.config


@pytest.mark.parametrize("exists", [False, True])
def test_what_cannot_be_trained_leaves_no_folder(
    tmp_path: Path, corpus: Path, exists: bool
) -> None:
    config = config_of(corpus, model={"dim": 30})
    folder = tmp_path / "run"
    if exists:
        folder.mkdir()
    with pytest.raises(ConfigError, match="dim = 30"):
        Run.create(folder, config)
    assert not list(folder.iterdir()) if exists else not folder.exists()


def test_foreign_folders_are_refused(tmp_path: Path, corpus: Path) -> None:
    for folder in (corpus, tmp_path / "nowhere"):
        with pytest.raises(ConfigError, match="is not the folder of a run"):
            Run.open(folder)


def test_open_finds_what_create_made(run: Run) -> None:
    opened = Run.open(run.folder)
    assert opened.config == run.config == load_toml(RunConfig, run.folder / "config.toml")
    assert opened.tokenizer.serialized() == run.tokenizer.serialized()
    assert len(opened.shards("train")) > len(opened.shards("held_out")) > 0


def test_vocabulary_follows_the_tokenizer(tmp_path: Path, corpus: Path) -> None:
    config = replace(config_of(corpus, num_steps=1), tokenizer=BPE(vocab_size=300))
    run = Run.create(tmp_path / "run", config)
    assert run.config.model.vocab_size == run.tokenizer.vocab_size > 257
    assert Run.open(run.folder).config == run.config
    list(train(run))
    assert run.load_model().embed.weight.shape[0] == run.tokenizer.vocab_size


@pytest.mark.parametrize("part", ["train", "held_out"])
def test_damaged_shard_is_refused_by_name(run: Run, part: str) -> None:
    path = run.folder / "tokens" / part / "tokens-00000.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="is damaged") as caught:
        run.shards(part)
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(ConfigError) as caught:
        run.shards(part)
    assert str(path) in str(caught.value)


def test_a_prepared_folder_trains_as_its_text_does(tmp_path: Path, corpus: Path, run: Run) -> None:
    config = run.config
    prepare(Preparation(paths=config.data.paths), ByteTokenizer(), tmp_path / "prepared")
    data = TextData(paths=(str(tmp_path / "prepared"),))
    other = Run.create(tmp_path / "other", replace(config, data=data, tokenizer=BPE()))
    assert other.tokenizer.serialized() == run.tokenizer.serialized()
    assert Run.open(other.folder).config == other.config
    assert [m.loss for m in train(other)] == [m.loss for m in train(run)]
    held_out = other.shards("held_out")
    assert (
        held_out.read(0, len(held_out)).tolist()
        == run.shards("held_out").read(0, len(held_out)).tolist()
    )


@pytest.mark.parametrize("changes", [{"held_out": 0.1}, {"field": "body"}, {"limit_mb": 1.0}])
def test_what_preparation_decided_is_not_set_again(
    tmp_path: Path, corpus: Path, changes: dict[str, Any]
) -> None:
    config = config_of(corpus)
    prepare(Preparation(paths=config.data.paths), ByteTokenizer(), tmp_path / "prepared")
    data = TextData(paths=(str(tmp_path / "prepared"),), **changes)
    with pytest.raises(ConfigError, match=rf"data\.{next(iter(changes))} = .*: was decided when"):
        Run.create(tmp_path / "run", replace(config, data=data))
    assert not (tmp_path / "run").exists()


def test_shards_of_another_tokenizer_are_refused(run: Run) -> None:
    other = BPE(vocab_size=300).build(["loop state encoded halt " * 20])
    with pytest.raises(ConfigError, match="another tokenizer"):
        replace(run, text_tokenizer=other).shards("train")


def test_metrics_are_logged_every_so_often_and_at_the_end(tmp_path: Path, corpus: Path) -> None:
    run = Run.create(tmp_path / "run", config_of(corpus, log_every=4))
    found = list(train(run))
    assert steps_of(run) == [0, 4, 5]
    assert read_metrics(run.folder)[1] == found[4].as_dict()


def test_metrics_log_drops_what_comes_again_and_forgives_a_cut_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in range(4):
        log.write({"step": step, "loss": float(step)})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    assert steps_in(path) == [0, 1, 2, 3]
    MetricsLog(tmp_path, 2).write({"step": 2, "loss": 9.0})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2]
    MetricsLog(tmp_path, 0)
    assert path.read_text() == ""


def steps_in(path: Path) -> list[float]:
    return [metrics["step"] for metrics in read_metrics(path.parent)]


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: is missing"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('nonsense\n{"step": 1}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl, line 1: is not JSON"):
        read_metrics(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 2**63),
        ("num_steps", 10**30),
        ("batch_size", 10**8),
        ("optimizer.lr", "inf"),
        ("optimizer.weight_decay", 1e308),
        ("num_steps", 0),
        ("batch_size", 2.5),
        ("seq_len", "true"),
        ("seed", -1),
        ("keep_checkpoints", 0),
        ("micro_batch_size", 3),
        ("clip_norm", 0.0),
    ],
)
def test_bad_training_settings_are_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{field} = .*: (must|times)"):
        apply_overrides(TrainConfig(batch_size=4), [f"{field}={value}"])


def test_the_largest_seed_trains(tmp_path: Path, corpus: Path) -> None:
    run = Run.create(tmp_path / "run", config_of(corpus, seed=2**63 - 1, num_steps=1))
    assert len(list(train(run))) == 1


def test_windows_longer_than_the_context_are_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.seq_len = 64: must be at most model\.context"):
        config_of(corpus, seq_len=64)


def test_corpus_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ConfigError, match="seq_len = 32 needs 33"):
        Run.create(tmp_path / "run", config_of(tmp_path / "short.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["short.txt"]
