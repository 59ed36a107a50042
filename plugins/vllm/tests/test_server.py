"""`vllm serve` with the plugin: the API and the engine are processes of their own."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from openmythos import OpenMythos
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.hub import export
from openmythos.model.config import MythosConfig
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE

MOST_LOOPS, NEW = 4, 8
SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_CPU_CI_ENV": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def post(port: int, **body: Any) -> tuple[int, dict[str, Any]]:
    url, data = f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10):
            return True
    except OSError:
        return False


@pytest.fixture(scope="module")
def model() -> OpenMythos:
    attention = LatentAttention(
        num_heads=2, kv_latent_dim=24, q_latent_dim=0, nope_head_dim=8, rope_head_dim=8
    )
    experts = MoE(num_experts=4, expert_dim=32)
    config = MythosConfig(dim=64, context=128, attention=attention, recurrent_feed_forward=experts)
    model = OpenMythos(config, seed=1).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def port(model: OpenMythos, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    folder: Path = tmp_path_factory.mktemp("server") / "model"
    export.write(model, folder, text=export.Text(tokenizer=ByteTokenizer()))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "mine"]
    command += ["--dtype", "float32", "--enforce-eager", "--no-enable-prefix-caching"]
    command += ["--hf-overrides", json.dumps({"num_loops": MOST_LOOPS}), "--max-num-seqs", "4"]
    server = subprocess.Popen(command, env=os.environ | SETTINGS)
    end = time.monotonic() + 600
    while not is_up(port):
        assert server.poll() is None, "the server has ended"
        assert time.monotonic() < end, "the server does not answer"
        time.sleep(1)
    yield port
    server.terminate()
    server.wait(60)


def test_requests_over_http(model: OpenMythos, port: int) -> None:
    """Of several loops at once; a wrong number is the client's error."""
    asks: list[tuple[list[int], int | None]] = [([1, 2, 3], 1), ([7] * 20, 3), ([5, 6], None)]

    def ask(row: list[int], loops: int | None) -> tuple[int, dict[str, Any]]:
        extra = {} if loops is None else {"vllm_xargs": {"num_loops": loops}}
        common = {"model": "mine", "temperature": 0, "max_tokens": NEW, "ignore_eos": True}
        return post(port, prompt=row, return_token_ids=True, **common, **extra)

    with ThreadPoolExecutor(len(asks)) as clients:
        found = list(clients.map(lambda one: ask(*one), asks))
    for (row, loops), (status, answer) in zip(asks, found, strict=True):
        assert status == 200, answer
        tokens = model.generate(
            torch.tensor([row]), max_new_tokens=NEW, num_loops=loops or MOST_LOOPS
        )
        assert answer["choices"][0]["token_ids"] == tokens[0].tolist()
    for wrong in (0, MOST_LOOPS + 1, "many"):
        status, answer = ask([1], wrong)  # type: ignore[arg-type]
        assert status == 400
        assert (
            f"num_loops = {wrong!r}: must be a whole number, 1 to 4" in answer["error"]["message"]
        )
