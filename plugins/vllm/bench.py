"""Tokens per second of a model in vLLM with this plugin and without it, taking turns.

Without it vLLM runs an export by its backend for models of transformers. One thread each; medians.

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
from pathlib import Path
from typing import Any

LOOPS, PROMPT, NEW, CONTEXT = 8, 64, 48, 256
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

    parts: dict[str, Any] = {
        # 48, not the preset's 32: without the plugin a head must be one of vLLM's sizes.
        "latent": {"attention": LatentAttention(nope_head_dim=48)},
        "grouped": {
            "attention": GroupedQueryAttention(num_heads=8, num_kv_heads=4),
            "recurrent_feed_forward": SwiGLU(),
        },
    }
    export.write(OpenMythos(MythosConfig(**parts[kind]), seed=0), folder)


def serve(path: str, folder: str) -> None:
    """Read jobs from stdin: the loops of each stream, 0: the engine's. Answer with seconds."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        model_impl="auto" if path == "plugin" else "transformers",
        trust_remote_code=path != "plugin",
        hf_overrides={"num_loops": LOOPS},
        skip_tokenizer_init=True,
        dtype="float32",
        enforce_eager=True,
        max_model_len=CONTEXT,
        max_num_seqs=max(STREAMS),
        enable_prefix_caching=False,
    )
    draw = random.Random(0)
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        rows = [{"prompt_token_ids": [draw.randrange(256) for _ in range(PROMPT)]} for _ in asked]
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
        start = time.perf_counter()
        llm.generate(rows, params, use_tqdm=False)
        print(time.perf_counter() - start, flush=True)


class Contender:
    """An engine in a process of its own."""

    def __init__(self, path: str, folder: Path) -> None:
        command = [sys.executable, __file__, "--serve", path, str(folder)]
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
    parser = argparse.ArgumentParser()
    parser.add_argument("model", choices=("latent", "grouped"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        build(args.model, folder := Path(place) / "model")
        engines = {path: Contender(path, folder) for path in ("plugin", "transformers")}
        jobs = {(path, f"{n} streams"): [0] * n for path in engines for n in STREAMS}
        n = STREAMS[-1]
        jobs |= {("plugin", f"{n} streams, half with 2 loops"): [2, LOOPS] * (n // 2)}
        jobs |= {("plugin", f"{n} streams, all with 2 loops"): [2] * n}
        found: dict[tuple[str, str], list[float]] = {job: [] for job in jobs}
        for turn in range(args.rounds + 1):
            for (path, name), loops in jobs.items():
                rate = engines[path].rate(loops)
                if turn:  # the first one warms up
                    found[path, name].append(rate)
    rates: dict[str, dict[str, float]] = {path: {} for path in engines}
    for (path, name), values in found.items():
        rates[path][name] = round(statistics.median(values), 1)
    result = {"model": args.model, "num_loops": LOOPS, "prompt": PROMPT, "new": NEW, "rates": rates}
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
