"""The benchmarks measure what they say: shapes, ratios, bounds; no times are asserted."""

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import bench
import cache as cache_benchmark
import claims
import contenders
import figures
import goals
import host
import kills
import limits
import loader as loader_benchmark
import path as call_path
import roster
import scaling
import speed_claims
import workers

from openmythos import machine
from openmythos.config import apply_overrides
from openmythos.files import write_json
from openmythos.planning import cost
from openmythos.recipes import catalogue

TINY = replace(
    contenders.S,
    **{"dim": 32, "heads": 2, "kv_latent": 8, "q_latent": 16, "rope": 4, "nope": 8, "value": 8},
    **{"experts": 4, "shared_dim": 16, "expert_dim": 8, "loops": 2, "batch": 2, "seq": 16},
    **{"vocab": 64, "context": 1024},
)
CPU = torch.device("cpu")
LIMITS = {"fp32": 1e11, "bf16": 2e11, "bandwidth": 2e10}


@pytest.mark.parametrize("name", ["openmythos-fp32", "openmythos-bf16"])
def test_every_figure_runs(name: str) -> None:
    contender = roster.CONTENDERS[name](TINY)
    for figure, prepare in workers.measures(TINY, CPU).items():
        prepare(contender)()
        assert limits.bound_seconds(TINY, figure, LIMITS, "fp32", 4) > 0
    with torch.no_grad():
        held = contender.prefill(torch.zeros(1, 64, dtype=torch.long), 0)
    size = 2 if name.endswith("bf16") else 4
    # prelude, coda and two loops, each with the latent and the shared rotary key
    assert contender.cache_bytes(held) / 64 == 4 * (8 + 4) * size


def test_our_model_of_a_workload_has_its_shapes() -> None:
    model = contenders.Ours(contenders.S, "fp32").model
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(3_959_682, rel=0.01)  # open-mythos 0.5.0 at the same shapes
    assert contenders.with_shape(TINY, seq=8).seq == 8


def result_of(ratio: float, share: float, memory: float) -> dict[str, Any]:
    return {
        "workload": {"name": "S"},
        "threads": 1,
        "device": "cpu",
        "ratio": {floor.figure: {"openmythos-fp32": ratio} for floor in goals.FLOORS},
        "share_of_bound": {
            figure: {"openmythos-fp32": share} for figure in ("training step", "decode, batch 1")
        },
        "first_call_seconds": {"decode, batch 1": {"openmythos-compiled": memory / 60}},
        "peak_megabytes": {"openmythos-fp32": memory, "open-mythos": 100.0},
    }


def test_goals_that_were_missed_are_named() -> None:
    assert goals.missed([result_of(15.0, 0.9, 50.0)], "avx2") == []
    assert goals.missed([result_of(3.0, 0.35, 90.0)], "avx2") == [
        "S: decode, batch 1 (fp32, torch, compiled): 3x of openmythos-fp32, goal 12x",
        "S: decode, batch 8 (fp32, torch, compiled): 3x of openmythos-fp32, goal 14x",
        "S: prefill, batch 8 (fp32, torch, compiled): 3x of openmythos-fp32, goal 3.7x",
        "S: share of the fp32 peak, training step: 35% of openmythos-fp32, goal 60%",
        "S: share of the bound, decode, batch 1: 35% of openmythos-fp32, goal 40%",
        "S: first compiled token, code cached: 1.5 s of openmythos-compiled, goal 1 s",
        "S: peak memory of a training step: 0.9x of openmythos-fp32, goal 0.7x",
    ]
    two_threads = result_of(3.0, 0.5, 90.0) | {"threads": 2}
    assert goals.missed([two_threads], "avx2") == []


def test_bf16_is_left_out_where_it_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "computes_bf16", lambda _: False)
    names, skipped = bench.chosen(None, CPU)
    assert names == tuple(name for name in roster.CPU_CONTENDERS if name not in goals.BF16)
    assert set(skipped) == set(goals.BF16)
    assert all("not native" in why for why in skipped.values())
    assert bench.chosen(["openmythos-bf16"], CPU) == (("openmythos-bf16",), {})
    monkeypatch.setattr(bench, "computes_bf16", lambda _: True)
    assert bench.chosen(None, CPU) == (roster.CPU_CONTENDERS, {})


@pytest.mark.parametrize("words", (["--figures", "decode, batch 3"], ["--tf32"]))
def test_what_cannot_be_measured_is_refused(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.options_of(words)
    assert words[0] in capsys.readouterr().err.splitlines()[-1]


class NoProcesses:
    """A team whose b cannot be prepared, whose c fails when it is timed; d does not decode."""

    def ask(
        self, names: Iterable[str], method: str, *arguments: object, together: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        failing = {"prepare": "b", "time": "c", "start": "e"}.get(method)
        answers = {"call": 9.0, "time": [1.0, 2.0, 3.0], "peak_megabytes": 5.0}
        found = {name: answers.get(method) for name in names if name != failing}
        if method == "prepare":
            found = {name: name != "d" for name in found}
        return found, {name: "out of memory" for name in names if name == failing}


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_contender_that_fails_does_not_stop_the_others(kind: str) -> None:
    timing = bench.Timing(NoProcesses(), "abcde", torch.device(kind), rounds=2)
    timing.figure("training step")
    assert timing.skipped == {"e": "out of memory"}
    assert timing.seconds == {"training step": {"a": 2.0}}
    assert timing.first == {"training step": {"a": 9.0, "c": 9.0}}
    assert timing.failed == {"training step": {"b": "out of memory", "c": "out of memory"}}
    assert timing.peak == ({"a": 5.0} if kind == "cuda" else {})


@pytest.mark.slow  # starts processes
def test_a_process_that_fails_or_ends_is_named() -> None:
    team = workers.Team(TINY, ("llama.cpp", "no such"), 1, CPU, False)
    with team:
        answers, failures = team.ask(("llama.cpp", "no such"), "start", together=True)
    assert not answers
    assert failures["no such"] == "KeyError: 'no such'"


def test_loops_that_read_their_weights_again_move_more_bytes() -> None:
    """At one row by hand: all of the model but the experts that the router leaves out."""
    config = TINY.config()
    parameters = cost.parameters(config)
    expert = parameters.routed_experts // TINY.experts
    outside = parameters.total - parameters.recurrent + parameters.loop_lora
    looped = parameters.total - outside - (TINY.experts - TINY.top_k) * expert
    cache = 4 * (TINY.kv_latent + TINY.rope) * limits.PROMPT  # prelude, coda, two loops
    for reread, times in ((False, 1), (True, TINY.loops)):
        moved = limits.decode_bytes(TINY, 1, 4, reread=reread)
        assert moved == pytest.approx(4 * (outside + times * looped + cache))
        many = limits.decode_bytes(TINY, 10_000, 4, reread=False)
    rows = 10_000 * cache
    assert many == pytest.approx(4 * (parameters.total + rows))


def test_kind_of_a_gpu_is_its_name_up_to_its_number() -> None:
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 4090")
    assert [host.gpu_kind(name) for name in names] == ["h100", "a100", "geforce-rtx-4090"]


def test_hardware_says_what_the_processor_can_do(monkeypatch: pytest.MonkeyPatch) -> None:
    found = machine.describe()
    capability = torch.backends.cpu.get_cpu_capability()
    assert found["capability"] == capability
    assert found["threads"] == torch.get_num_threads()
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    for native, suffix in ((True, "-bf16"), (False, "")):
        for module in (machine, host):
            monkeypatch.setattr(module, "bf16_is_native", lambda _=CPU, native=native: native)
        assert machine.describe()["bf16_is_native"] is native
        assert host.processor_kind() == capability.lower() + suffix


def test_the_commit_is_that_of_the_code_and_of_no_other_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        done = subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, check=True)
        return done.stdout.decode().strip()

    own = machine.describe()
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "another project")
    other = git("rev-parse", "HEAD")
    monkeypatch.chdir(tmp_path)  # called from another project
    assert (machine.describe()["commit"], machine.describe()["dirty"]) == (
        own["commit"],
        own["dirty"],
    )
    assert own["commit"] != other
    inside = tmp_path / "site-packages" / "machine.py"  # installed inside another project
    inside.parent.mkdir()
    monkeypatch.setattr(machine, "__file__", str(inside))
    assert machine.describe()["commit"] == "unknown" and not machine.describe()["dirty"]
    inside.write_text("")
    git("add", "site-packages")  # a project that keeps its libraries
    assert machine.describe()["commit"] == other


def test_a_second_kind_of_processor_is_a_column(tmp_path: Path) -> None:
    for kind in ("avx512-bf16", "avx2"):
        found = speed_claims.load(claims.ROOT / "results", "bench/avx512-bf16/bench-S.json")
        if kind == "avx2":
            for run in found["results"]:
                for figures in (run["ratio"], run["share_of_bound"], run["seconds"]):
                    for times in figures.values():
                        for name in goals.BF16:
                            times.pop(name, None)
                held = run["cache_bytes_per_token"]
                for name in goals.BF16:
                    del held[name]
                del run["peak_megabytes"]
        (tmp_path / "bench" / kind).mkdir(parents=True)
        write_json(found, tmp_path / "bench" / kind / "bench-S.json")
    head, _, *rows = speed_claims.kinds_table(tmp_path).splitlines()
    assert head == "| | | S, avx512-bf16 | S, avx2 |"
    one = speed_claims.load(claims.ROOT / "results", "bench/avx512-bf16/bench-S.json")["results"][0]
    ratios = one["ratio"]["training step"]
    fp32, half = (f"{ratios[name]:.2f}x" for name in ("openmythos-fp32", "openmythos-bf16"))
    assert f"| training step | fp32 | {fp32} | {fp32} |" in rows
    assert f"| training step | bf16 | {half} |  |" in rows
    floors = speed_claims.floors_table(tmp_path).splitlines()
    bf16 = next(line for line in floors if "(bf16, bf16-compiled)" in line)
    assert bf16.split("|")[2:-1] == [f" {half} (2x) ", "  "]
    assert speed_claims.speed_tables(tmp_path).count("threads, avx2") == 1


def test_a_line_is_found_again() -> None:
    fit = scaling.line_fit({n: 0.25 + 0.125 * n for n in (1, 2, 8, 64)})
    assert fit["fixed_seconds"] == pytest.approx(0.25)
    assert fit["seconds_per_loop"] == pytest.approx(0.125)
    assert fit["largest_relative_error"] < 1e-9


def test_halted_positions_are_the_share_asked_for() -> None:
    assert scaling.outside_the_loop(rounds=1) > 0
    halted = scaling._Halted(0.75, batch=2, seq=16)
    running = halted.update(None, torch.ones(2, 16, dtype=torch.bool), 0)
    assert running.sum(dim=1).tolist() == [4, 4]


def test_cache_table_is_the_formula() -> None:
    for row in cache_benchmark.sizes():
        config = cache_benchmark.presets.get(row["preset"])
        outer = config.prelude_layers + config.coda_layers
        width = config.attention.kv_latent_dim + config.attention.rope_head_dim
        assert row["exact"] == 2 * width * (outer + 16 * config.recurrent_layers)
        assert row["shared"] == 2 * width * (outer + config.recurrent_layers)
        assert row["full_multi_head"] == 4 * config.dim * row["layers_executed"]
        assert row["recurrent_shared_ratio"] == 16


@pytest.mark.slow
def test_memory_is_that_of_the_process_alone() -> None:
    small, large = (scaling.peak_of(loops, 256, "all loops") for loops in (1, 16))
    assert 10 < small < large


def test_every_number_in_the_readme_is_that_of_the_results() -> None:
    for path, text in claims.pages(claims.ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name}: run `make claims`"


def test_the_readme_has_nine_claims_of_a_few_words() -> None:
    results = claims.ROOT / "results"
    _, _, *rows = claims.claims_table(results).splitlines()
    done = [name for name in claims.STUDIES if (results / name / "report.md").exists()]
    assert len(rows) == len({*done} - claims.IN_DOCS_ONLY) == 9
    for row in rows:
        words = re.sub(r"\]\(.*?\)", "]", row).replace("|", " ").split()
        assert len(words) <= 25, row
    shown = [claims.load(results, f"{name}/results.json") for name in done]
    verdicts = {data["finding"]["verdict"] for data in shown}
    assert all(any(f"| [{verdict}](results/" in row for verdict in verdicts) for row in rows)


@pytest.mark.parametrize(
    ("bits", "more", "shown"),
    [
        ({1: [1.8, 1.9], 4: [1.5, 1.6], 12: [1.6, 1.7]}, "4 loops against 1: -0.300", 3),
        ({2: [1.8, 1.9], 8: [1.5, 1.6]}, "8 loops against 2: -0.300", 2),
        ({1: [1.5, 1.6], 16: [1.6, 1.7]}, "**no**, not after so short a training: 16 loops", 2),
    ],
)
def test_the_demo_may_be_asked_at_other_numbers_of_loops(
    bits: dict[int, list[float]], more: str, shown: int, tmp_path: Path
) -> None:
    runs = [
        {
            "held_out": {str(n): {"bits_per_byte": values[seed]} for n, values in bits.items()},
            "compressors_bits_per_byte": {"gzip-9": 1.9, "xz-9": 1.5},
        }
        for seed in (0, 1)
    ]
    (tmp_path / "demo").mkdir()
    found = json.dumps({"command": "python demo.py", "runs": runs})
    (tmp_path / "demo" / "results.json").write_text(found)
    first, second = claims.demo_rows(tmp_path)
    assert first.count(" ± ") == shown and "mean and 95% interval of 2 seeds" in first
    assert more in second
    assert claims.demo_sentence(tmp_path).count("(its best)") == 1


@pytest.mark.slow
def test_a_run_killed_at_twenty_moments_ends_as_the_one_left_alone(tmp_path: Path) -> None:
    found = kills.measure(tmp_path, 20, 1500, seed=1)
    assert {point["way"] for point in found["kills"]} == set(kills.WAYS)
    codes = {"SIGKILL": -9, "SIGTERM": 143, "full": 1}
    assert all(point["exit_code"] == codes[point["way"].split()[0]] for point in found["kills"])
    assert sum(point["during_a_checkpoint"] for point in found["kills"]) >= 3
    assert found["compared"]["steps"] == 1500
    assert found["compared"]["steps_that_differ"] == 0
    assert found["compared"]["tensors_that_differ"] == 0


def test_the_loader_is_timed_within_the_step(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("loop state halt\n" * 200)
    overrides = [f'data.paths=["{tmp_path}/text.txt"]', "model.dim=32", "train.batch_size=2"]
    found = loader_benchmark.measure(apply_overrides(catalogue.get("tiny"), overrides), 2, 5)
    assert len(found["step_seconds"]) == len(found["batch_seconds"]) == 2
    assert 0 < found["share"] < 1
    assert found["alone_tokens_per_second"] * found["alone_median_seconds"] == pytest.approx(128)


def test_speed_ratios_are_bars_from_each_panel() -> None:
    panels = {
        "S, 1 thread": {"forward": {"ours": 1.5, "peer": 0.9}, "decode": {"ours": 4.0}},
        "M, 1 thread": {"forward": {"ours": 2.0, "peer": 1.1}, "decode": {"ours": 8.0}},
    }
    figure = figures.speed_ratios(panels, reference="theirs")
    widths = [sorted(bar.get_width() for bar in axes.patches) for axes in figure.axes]
    assert widths == [[0.9, 1.5, 4.0], [1.1, 2.0, 8.0]]
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(panels)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ours", "peer"]
    with pytest.raises(ValueError, match="no bar"):
        figures.speed_ratios({"S": {}}, reference="theirs")


def test_cost_lines_have_a_panel_per_quantity() -> None:
    panels = {"num_loops": {"time": {4: 8.0, 1: 2.0}}, "context": {"time": {256: 1.0, 512: 2.0}}}
    figure = figures.cost_lines(panels, y_labels=("ms", "MiB"))
    lines = [axes.lines[0] for axes in figure.axes]
    assert [line.get_xydata().tolist() for line in lines] == [
        [[1, 2], [4, 8]],
        [[256, 1], [512, 2]],
    ]
    assert [axes.get_ylabel() for axes in figure.axes] == ["ms", "MiB"]
    assert {axes.get_xscale() for axes in figure.axes} == {"log"}
    named_axis = figures.cost_lines(
        {"preset": {"bytes": {0: 1.0, 1: 3.0}}}, y_labels=("KiB",), x_names=("1b", "3b")
    )
    assert [text.get_text() for text in named_axis.axes[0].get_xticklabels()] == ["1b", "3b"]
    with pytest.raises(ValueError, match="no line"):
        figures.cost_lines({"num_loops": {}}, y_labels=("ms",))


def test_a_call_passes_no_more_functions_than_docs_say() -> None:
    """What a reader has to follow; a change that needs more must say so in docs/architecture.md."""
    functions = {name: count for name, (count, _) in call_path.counted().items()}
    assert functions["decoded token"] <= 47
    assert functions["prefill"] <= 97
    assert functions["training step (losses and backward)"] <= 114
