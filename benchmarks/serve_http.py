"""Whole servers and engines on all cores, by the clock; writes results/serve/<processor>.

    python benchmarks/serve_http.py server

server    `openmythos serve` with 32 streams, over HTTP as events and as one answer, against the
          same engines without HTTP, and against `generate` one by one
replicas  two engines of one thread against one engine of two
overload  requests that arrive at random, at 50, 100 and 150% of what 64 clients in turn get
others    engine, one thread, against transformers: `generate` as one batch of DeepSeek-V3, which
          has the shapes of the workload without its loops, and of a Llama (see `yardsticks`), and
          that Llama with its continuous batching, which knows no latent attention

Workload S, weights that are not trained. The clients of the server run on the same cores.
"""

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from contenders import WORKLOADS, Workload
from host import processor_kind
from rich.console import Console
from serve import Outcome, engine_limits, one_by_one, requests, served

from openmythos import OpenMythos
from openmythos.data.tokenizer import BPETokenizer
from openmythos.files import write_json
from openmythos.inference.request import EngineRequest
from openmythos.machine import describe, keep_freed_memory

OUT = Console(highlight=False, markup=False)
STREAMS, CLIENTS = 32, 64
PROMPT, NEW = 32, 64
SHARES = (0.5, 1.0, 1.5)  # of the peak
SECONDS = 15.0  # of requests that arrive at random
REPLICAS = 2


def asked(workload: Workload, count: int) -> list[EngineRequest]:
    lengths = {"prompt": (PROMPT, PROMPT), "new": (NEW, NEW)}
    return requests(workload, count, depths=(workload.loops,), **lengths)


# Engines in processes of their own


def _engine(workload: Workload, threads: int, pipe: Any) -> None:
    """Body of a process: serves (number of requests, rows) until it gets None."""
    torch.set_num_threads(threads)
    keep_freed_memory()
    model = OpenMythos(workload.config(), seed=0).eval()
    served(model, asked(workload, 2), engine_limits(2))  # builds the kernel
    pipe.send("ready")
    while (work := pipe.recv()) is not None:
        count, rows = work
        pipe.send(served(model, asked(workload, count), engine_limits(rows)).tokens)


class Engines:
    """Processes with an engine each."""

    def __init__(self, workload: Workload, processes: int, threads: int) -> None:
        context, self._pipes = multiprocessing.get_context("spawn"), []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            target = context.Process(target=_engine, args=(workload, threads, theirs), daemon=True)
            target.start()
            self._pipes.append(ours)
        for pipe in self._pipes:
            pipe.recv()

    def serve(self, count: int, rows: int) -> Outcome:
        """So many requests, each engine its share, `rows` of them at a time."""
        start = time.perf_counter()
        for pipe in self._pipes:
            pipe.send((count // len(self._pipes), rows))
        tokens = sum(pipe.recv() for pipe in self._pipes)
        return Outcome(tokens, time.perf_counter() - start)

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.send(None)


# A server and its clients


@contextlib.contextmanager
def server(workload: Workload, *options: str) -> Iterator[str]:
    """The address of a server in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        OpenMythos(workload.config(), seed=0).save_pretrained(folder)
        words, dice = [], random.Random(0)
        for _ in range(40_000):
            words.append("".join(dice.choices("abcdefghijklmnopqrstuvwxyz", k=dice.randint(2, 7))))
        BPETokenizer.train([" ".join(words)], workload.vocab).save(folder)
        command = [sys.executable, "-m", "openmythos", "serve", folder, "--port", "0"]
        process = subprocess.Popen(
            [*command, "--replicas", str(REPLICAS), "--precision", "fp32", *options],
            env=os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            found = next(filter(None, (re.search(r"http://\S+", x) for x in process.stdout)))
            _ready(found[0])
            yield found[0]
        finally:
            process.terminate()
            process.wait(60)


def _ready(url: str) -> None:
    """Until all replicas take work."""
    from urllib.request import urlopen

    while True:
        with urlopen(f"{url}/health") as answer:
            if all(each["state"] == "ready" for each in json.load(answer)["replicas"]):
                return
        time.sleep(0.1)


@dataclass
class Answers:
    """What clients got: seconds of answers and first tokens, when they ended, how many refused."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    refused: int = 0

    async def ask(self, url: str, request: EngineRequest, *, stream: bool) -> None:
        """One request in a connection of its own."""
        body = {
            "prompt": list(request.prompt),
            "max_tokens": request.options.max_new_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }
        where, data = urlsplit(url), json.dumps(body).encode()
        head = f"Host: localhost\r\nConnection: close\r\nContent-Length: {len(data)}\r\n"
        start = time.perf_counter()
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        writer.write(f"POST /v1/completions HTTP/1.1\r\n{head}".encode())
        writer.write(b"Content-Type: application/json\r\n\r\n" + data)
        status = int((await reader.readuntil(b"\r\n\r\n")).split()[1])
        text = await reader.read(2**16)
        first = time.perf_counter() - start
        while chunk := await reader.read(2**16):
            text += chunk
        writer.close()
        if status == 429:
            self.refused += 1
            return
        if status != 200 or b'"length"' not in text:
            raise RuntimeError(f"status {status}: {text[-200:]!r}")
        self.first.append(first)
        self.ended.append(time.perf_counter())
        self.seconds.append(self.ended[-1] - start)


async def in_turn(url: str, work: Sequence[EngineRequest], clients: int, *, stream: bool) -> float:
    """Seconds in which so many clients, each with one request at a time, get all answers."""
    left, answers = list(work), Answers()

    async def client() -> None:
        while left:
            await answers.ask(url, left.pop(), stream=stream)

    start = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return time.perf_counter() - start


async def at_random(
    url: str, work: Sequence[EngineRequest], per_second: float, seconds: float
) -> tuple[Answers, float, int]:
    """(answers, answers per second after the first fifth, requests sent); they arrive at random."""
    dice, answers, tasks = random.Random(0), Answers(), []
    start = due = time.perf_counter()
    end = start + seconds
    while (due := due + dice.expovariate(per_second)) < end:
        await asyncio.sleep(due - time.perf_counter())
        request = work[len(tasks) % len(work)]
        tasks.append(asyncio.create_task(answers.ask(url, request, stream=True)))
    await asyncio.gather(*tasks)
    counted = sum(start + seconds / 5 < when < end for when in answers.ended)
    return answers, counted / (0.8 * seconds), len(tasks)


# Sections

Found = dict[str, dict[str, Any]]


def take_turns(contenders: dict[str, Callable[[], Outcome]], rounds: int) -> Found:
    """Medians over the rounds; the ratio is to the first contender of the same round."""
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            rates[name].append(run().tokens_per_second)
    first = next(iter(rates.values()))
    found = {}
    for name, own in rates.items():
        ratios = [rate / base for rate, base in zip(own, first, strict=True)]
        median = statistics.median
        found[name] = {"tokens_per_second": median(own), "ratio": median(ratios), "ratios": ratios}
    return found


def by_clock(run: Callable[[], Outcome]) -> Outcome:
    start = time.perf_counter()
    tokens = run().tokens
    return Outcome(tokens, time.perf_counter() - start)


def whole_server(workload: Workload, rounds: int) -> Found:
    work, model = asked(workload, 4 * STREAMS), OpenMythos(workload.config(), seed=0).eval()
    tokens, engines = NEW * len(work), Engines(workload, REPLICAS, 1)
    one_by_one(model, work)
    with server(workload, "--set", f"engine.pages={2**14}") as url:

        def over_http(*, stream: bool) -> Outcome:
            return Outcome(tokens, asyncio.run(in_turn(url, work, STREAMS, stream=stream)))

        over_http(stream=True)
        found = take_turns(
            {
                "generate one by one, 1 thread": lambda: by_clock(lambda: one_by_one(model, work)),
                "2 engines": lambda: engines.serve(len(work), STREAMS // REPLICAS),
                "server, events": lambda: over_http(stream=True),
                "server, one answer": lambda: over_http(stream=False),
            },
            rounds,
        )
    engines.close()
    return found


def replicas(workload: Workload, rounds: int) -> Found:
    shapes = {
        "1 process, 2 threads, 16 rows": (1, 2, 16),
        "1 process, 1 thread, 16 rows": (1, 1, 16),
        "2 processes, 1 thread, 16 rows each": (2, 1, 16),
        "2 processes, 1 thread, 8 rows each": (2, 1, 8),
    }
    engines = {name: Engines(workload, shape[0], shape[1]) for name, shape in shapes.items()}
    contenders = {
        name: lambda name=name: engines[name].serve(4 * 16, shapes[name][2]) for name in shapes
    }
    found = take_turns(contenders, rounds)
    for each in engines.values():
        each.close()
    return found


def overload(workload: Workload, rounds: int) -> Found:
    work, found = asked(workload, 4 * CLIENTS), Found()
    with server(workload, "--set", f"engine.pages={2**14}") as url:
        asyncio.run(in_turn(url, work, CLIENTS, stream=True))
        spent = [asyncio.run(in_turn(url, work, CLIENTS, stream=True)) for _ in range(rounds)]
        peak = len(work) / statistics.median(spent)
        found["peak"] = {"tokens_per_second": peak * NEW, "ratio": 1.0}
        for share in SHARES:
            answers, good, sent = asyncio.run(at_random(url, work, share * peak, SECONDS))
            rate = good * NEW
            found[f"{share:.0%} of the peak"] = {
                "tokens_per_second": rate,
                "ratio": rate / peak / NEW,
                "sent": sent,
                "refused": answers.refused,
                "seconds": _parts(answers.seconds),
                "first_token_seconds": _parts(answers.first),
            }
    return found


def _parts(numbers: Sequence[float]) -> dict[str, float]:
    ordered = sorted(numbers)
    return {f"p{p}": ordered[len(ordered) * p // 100] for p in (50, 95, 99)}


def others(workload: Workload, rounds: int) -> Found:
    from peers import DeepSeek
    from transformers import ContinuousBatchingConfig, GenerationConfig
    from yardsticks import dense_llama

    work, model = asked(workload, 16), OpenMythos(workload.config(), seed=0).eval()
    served(model, asked(workload, 2), engine_limits(2))
    prompts = torch.tensor([request.prompt for request in work])

    def generate(theirs: Any, cache: str) -> Outcome:
        start = time.perf_counter()
        with torch.inference_mode():
            out = theirs.generate(
                prompts,
                max_new_tokens=NEW,
                min_new_tokens=NEW,
                do_sample=False,
                attention_mask=torch.ones_like(prompts),
                pad_token_id=0,
                cache_implementation=cache,
                disable_compile=True,
            )
        return Outcome(out.shape[0] * (out.shape[1] - PROMPT), time.perf_counter() - start)

    def batched_continuously(theirs: Any) -> Outcome:
        start = time.perf_counter()
        with torch.inference_mode():
            out = theirs.generate_batch(
                prompts.tolist(),
                generation_config=GenerationConfig(
                    max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
                ),
                continuous_batching_config=ContinuousBatchingConfig(
                    page_size=32, num_blocks=128, max_batch_tokens=len(work) * PROMPT
                ),
                warmup=False,
            )
        tokens = sum(len(answer.generated_tokens) for answer in out.values())
        assert tokens == len(work) * NEW, tokens  # an error of a request is only logged
        return Outcome(tokens, time.perf_counter() - start)

    deepseek, llama = DeepSeek(workload).model.eval(), dense_llama(workload)
    return take_turns(
        {
            "DeepSeek-V3, static cache": lambda: generate(deepseek, "static"),
            "DeepSeek-V3, dynamic cache": lambda: generate(deepseek, "dynamic"),
            "Llama, static cache": lambda: generate(llama, "static"),
            "Llama, continuous batching": lambda: batched_continuously(llama),
            "engine, 16 rows": lambda: by_clock(lambda: served(model, work, engine_limits(16))),
        },
        rounds,
    )


SECTIONS = {
    "server": whole_server,
    "replicas": replicas,
    "overload": overload,
    "others": others,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=list(SECTIONS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/serve"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    machine = describe()
    found = SECTIONS[options.section](WORKLOADS["S"], options.rounds)
    path = options.out / processor_kind() / f"{options.section}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/serve_http.py " + " ".join(sys.argv[1:])
    write_json({"command": command, "hardware": machine, options.section: found}, path)
    for name, one in found.items():
        OUT.print(f"{name}: {one['tokens_per_second']:.0f} tok/s, {one['ratio']:.2f}x")


if __name__ == "__main__":
    main()
