"""Tokens per second of a model in vLLM with this plugin, and beside it, taking turns.

`latent` and `grouped`: against vLLM without the plugin, which then runs an export by its backend
for models of transformers. `S` and `M`, the shapes of benchmarks/bench.py: against OpenMythos' own
engine. One thread each; medians.

    python plugins/vllm/bench.py latent --out results/serve/vllm-latent.json
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

LOOPS = {"latent": 8, "grouped": 8, "S": 4, "M": 8}
PROMPT, NEW, CONTEXT = 64, 48, 256
WORDS = 256  # prompts are of these tokens
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STREAMS = (1, 8, 32)
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def build(kind: str, folder: Path) -> None:
    from openmythos import OpenMythos
    from openmythos.hub import export
    from openmythos.model.config import MythosConfig
    from openmythos.nn.feed_forward import SwiGLU
    from openmythos.nn.grouped_query import GroupedQueryAttention
    from openmythos.nn.latent_attention import LatentAttention

    if kind in ("S", "M"):
        sys.path.insert(0, str(BENCHMARKS))
        from contenders import WORKLOADS

        export.write(OpenMythos(WORKLOADS[kind].config(), seed=0), folder)
        return
    parts: dict[str, Any] = {
        # 48, not the preset's 32: without the plugin a head must be one of vLLM's sizes.
        "latent": {"attention": LatentAttention(nope_head_dim=48)},
        "grouped": {
            "attention": GroupedQueryAttention(num_heads=8, num_kv_heads=4),
            "recurrent_feed_forward": SwiGLU(),
        },
    }
    export.write(OpenMythos(MythosConfig(**parts[kind]), seed=0), folder)


def serve(path: str, folder: str, num_loops: str) -> None:
    """Read jobs from stdin: the loops of each stream, 0: num_loops. Answer with seconds."""
    work = own_engine(folder, int(num_loops)) if path == "engine" else vllm(path, folder, num_loops)
    draw = random.Random(0)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        prompts = [[draw.randrange(WORDS) for _ in range(PROMPT)] for _ in asked]
        start = time.perf_counter()
        tokens = work(prompts, asked)
        seconds = time.perf_counter() - start
        assert tokens == NEW * len(asked), (tokens, asked)
        print(seconds, flush=True)


Work = Callable[[list[list[int]], list[int]], int]  # (prompts, loops of each) -> new tokens


def own_engine(folder: str, num_loops: int) -> Work:
    import torch

    import openmythos
    from openmythos.inference.engine import Engine
    from openmythos.inference.generation import Request
    from openmythos.inference.request import EngineLimits, EngineRequest, NewToken
    from openmythos.machine import keep_freed_memory

    torch.set_num_threads(1)
    keep_freed_memory()
    model = openmythos.load(folder)

    def work(prompts: list[list[int]], asked: list[int]) -> int:
        engine, tokens = Engine(model, EngineLimits(max_rows=max(STREAMS))), 0
        for prompt, loops in zip(prompts, asked, strict=True):
            options = Request(max_new_tokens=NEW, num_loops=loops or num_loops)
            engine.add(EngineRequest(prompt=tuple(prompt), options=options))
        while not engine.idle:
            tokens += sum(isinstance(event, NewToken) for event in engine.step())
        return tokens

    return work


def vllm(path: str, folder: str, num_loops: str) -> Work:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        model_impl="auto" if path == "plugin" else "transformers",
        trust_remote_code=path != "plugin",
        hf_overrides={"num_loops": int(num_loops)},
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=max(STREAMS),
        enable_prefix_caching=False,
    )

    def work(prompts: list[list[int]], asked: list[int]) -> int:
        rows = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=NEW,
                ignore_eos=True,
                detokenize=False,
                extra_args={"num_loops": loops} if loops else None,
            )
            for loops in asked
        ]
        found = llm.generate(rows, params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in found)

    return work


class Contender:
    """An engine in a process of its own."""

    def __init__(self, path: str, folder: Path, num_loops: int) -> None:
        command = [sys.executable, __file__, "--serve", path, str(folder), str(num_loops)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, env=os.environ | SETTINGS, text=True, **pipes)
        self._until("ready")

    def _until(self, word: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(word) or (not word and line[:1].isdigit()):
                return line
        raise RuntimeError("an engine has ended")

    def rate(self, loops: list[int]) -> float:
        """Tokens per second of as many streams, prompts included in the time."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(loops) + "\n")
        self.process.stdin.flush()
        return len(loops) * NEW / float(self._until(""))


def main() -> None:
    from openmythos.machine import describe

    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=tuple(LOOPS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        build(args.model, folder := Path(place) / "model")
        loops_of, other = LOOPS[args.model], "engine" if args.model in "SM" else "transformers"
        engines = {path: Contender(path, folder, loops_of) for path in ("plugin", other)}
        jobs = {(path, f"{n} streams"): [0] * n for path in engines for n in STREAMS}
        n = STREAMS[-1]
        for path in engines.keys() - {"transformers"}:  # which has no loops by request
            jobs[path, f"{n} streams, half with 2 loops"] = [2, loops_of] * (n // 2)
            jobs[path, f"{n} streams, all with 2 loops"] = [2] * n
        found: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
        for turn in range(args.rounds + 1):
            for (path, name), loops in jobs.items():
                rate = engines[path].rate(loops)
                if turn:  # the first one warms up
                    found[path, name].append(rate)
    rates: dict[str, dict[str, float]] = {path: {} for path in engines}
    for (path, name), values in found.items():
        rates[path][name] = round(statistics.median(values), 1)
    result = {"model": args.model, "num_loops": loops_of, "prompt": PROMPT, "new": NEW}
    result |= {"hardware": describe(), "rates": rates}
    print(text := json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(text + "\n")
    for engine in engines.values():
        engine.process.terminate()


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(*sys.argv[2:])
    else:
        main()
