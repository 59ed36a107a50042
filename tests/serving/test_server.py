"""The server as a process, with real clients: openai, curl, sockets, signals, kill -9."""

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import pytest
from serving.running import Server, serving, wait_for

pytestmark = pytest.mark.slow
LONG = {"max_tokens": 80, "ignore_eos": True, "num_loops": 32}


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two replicas; chat by a template."""
    template = tmp_path_factory.mktemp("chat") / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with serving(str(folder), "--replicas", "2", "--chat-template", str(template)) as found:
        yield found


def test_the_openai_client(server: Server) -> None:
    openai = pytest.importorskip("openai", reason="the openai package is not installed")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == ["tiny-lm"]
    extra = {"num_loops": 5, "return_loops": True}
    asked = {"model": "tiny-lm", "prompt": "ab", "max_tokens": 8, "temperature": 0}
    whole = client.completions.create(**asked, logprobs=2, extra_body=extra)
    assert whole.choices[0].loops == [5] * len(whole.choices[0].loops)
    assert whole.usage.token_loops > 0 and whole.choices[0].logprobs.top_logprobs
    streamed = client.completions.create(**asked, stream=True, extra_body=extra)
    assert "".join(x.choices[0].text for x in streamed) == whole.choices[0].text
    chat = {"model": "tiny-lm", "messages": [{"role": "user", "content": "ab"}], "temperature": 0}
    said = client.chat.completions.create(**chat, max_completion_tokens=8, extra_body=extra)
    assert said.choices[0].message.content == whole.choices[0].text
    deltas = client.chat.completions.create(
        **chat, max_tokens=8, stream=True, stream_options={"include_usage": True}, extra_body=extra
    )
    *chunks, last = list(deltas)
    assert "".join(x.choices[0].delta.content for x in chunks) == whole.choices[0].text
    assert last.choices == [] and last.usage.completion_tokens == said.usage.completion_tokens
    with pytest.raises(openai.NotFoundError, match="is not served here"):
        client.completions.create(**(asked | {"model": "other"}))
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(**asked, extra_body={"num_loop": 3})
    assert wrong.value.param == "num_loop" and "num_loops" in wrong.value.message


def test_curl(server: Server) -> None:
    body = json.dumps({"prompt": "ab", "max_tokens": 4, "stream": True})
    curl = ["curl", "-sS", "-N", "--max-time", "30"]
    post = [*curl, "-d", body, "-H", "content-type: application/json"]
    out = subprocess.run([*post, f"{server.url}/v1/completions"], capture_output=True, text=True)
    assert out.returncode == 0 and out.stdout.endswith("data: [DONE]\n\n"), out
    # A form, which a page of another site could send, is refused.
    form = [*curl, "-w", "%{http_code}", "-d", body, f"{server.url}/v1/completions"]
    assert subprocess.run(form, capture_output=True, text=True).stdout.endswith("415")
    host = [*curl, "-w", "%{http_code}", "-H", "Host: evil.example", f"{server.url}/v1/models"]
    assert subprocess.run(host, capture_output=True, text=True).stdout.endswith("403")


def _connect(server: Server, body: dict[str, Any]) -> socket.socket:
    """A connection on which a request has been sent."""
    where = urlsplit(server.url)
    connection = socket.create_connection((where.hostname, where.port))
    data = json.dumps({"prompt": "ab"} | body)
    connection.sendall(
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\ncontent-type: application/json\r\n"
        f"content-length: {len(data)}\r\n\r\n{data}".encode()
    )
    return connection


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row_within_a_second(
    server: Server, stream: bool, half: bool
) -> None:
    connections = [_connect(server, {**LONG, "n": 2, "stream": stream}) for _ in range(4)]
    wait_for(lambda: len(server.get("/engine")["rows"]) == 8, 10)
    for connection in connections:
        connection.shutdown(socket.SHUT_WR if half else socket.SHUT_RDWR)
    wait_for(lambda: server.get("/engine")["rows"] == [], 1.5)
    for connection in connections:
        connection.close()
    assert server.complete(max_tokens=3) == server.complete(max_tokens=3)


def test_kill_9_of_a_replica_under_load(folder: Path) -> None:
    with (
        serving(str(folder), "--replicas", "2") as server,
        ThreadPoolExecutor(8) as threads,
    ):
        canary = server.complete(max_tokens=8)
        first, second = server.children()
        asked = [
            threads.submit(server.ask, "/v1/completions", {"prompt": "ab", **LONG})
            for _ in range(8)
        ]
        wait_for(lambda: len(server.get("/engine")["rows"]) == 8, 10)
        os.kill(first, signal.SIGKILL)
        statuses = sorted(answer.result()[0] for answer in asked)
        assert set(statuses) == {200, 500} and statuses.count(200) >= 4
        wait_for(lambda: server.get("/health")["status"] == "ok", 20)
        assert first not in server.children() and second in server.children()
        assert {server.complete(max_tokens=8) for _ in range(6)} == {canary}


def test_a_full_disk_under_its_log_stops_nothing(folder: Path) -> None:
    """The death of a replica is logged, which fails."""
    with open("/dev/full", "w") as full, serving(str(folder), errors=full) as server:
        canary = server.complete(max_tokens=8)
        for child in server.children():
            os.kill(child, signal.SIGKILL)
        wait_for(lambda: server.get("/health")["replicas"][0]["restarts"] == 1, 20)
        wait_for(lambda: server.get("/health")["status"] == "ok", 60)
        assert server.complete(max_tokens=8) == canary
        server.process.send_signal(signal.SIGTERM)
        assert server.ended(30) == 0


def test_sigterm_lets_accepted_work_finish(folder: Path) -> None:
    with serving(str(folder), "--replicas", "1") as server:
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(server.complete, "ab", **LONG) for _ in range(4)]
            wait_for(lambda: len(server.get("/engine")["rows"]) == 4, 10)
            server.process.send_signal(signal.SIGTERM)
            wait_for(lambda: server.get("/health")["status"] == "draining", 2)
            assert server.ask("/v1/completions", {"prompt": "ab"})[0] == 503
            assert all(len(answer.result()) > 20 for answer in asked)
        assert server.ended(30) == 0, "".join(server.log)


def test_its_lines_say_what_is_served_and_where_and_that_it_ends() -> None:
    with serving("--replicas", "2") as server, urlopen(f"{server.url}/engine?stream=true") as page:
        page.readline()  # an open page holds up nothing
        began = time.monotonic()
        server.process.send_signal(signal.SIGINT)
        assert server.ended(30) == 0
        took = time.monotonic() - began
    loading = "loading hops: 148,288 parameters, trained with 20 loops; 2 replicas\n"
    assert server.log == [loading, f"serving at {server.url} (Ctrl-C ends)\n", "ending\n"]
    assert took < 5  # 1.5 s on an idle machine


def test_a_second_sigterm_ends_at_once_with_an_error_for_the_rest(folder: Path) -> None:
    with serving(str(folder), "--replicas", "1") as server, ThreadPoolExecutor(1) as threads:
        body = {"prompt": "ab", **LONG, "n": 16, "num_loops": 64, "stream": True}
        curl = ["curl", "-sSN", "-d", json.dumps(body), "-H", "content-type: application/json"]
        url = f"{server.url}/v1/completions"
        asked = threads.submit(subprocess.run, [*curl, url], capture_output=True, text=True)
        wait_for(lambda: len(server.get("/engine")["rows"]) == 16, 10)
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.get("/health")["status"] == "draining", 2)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.ended(30) == 0 and time.monotonic() - began < 15
        out = asked.result()
        assert "the server was stopped" in out.stdout and "[DONE]" not in out.stdout
        assert out.returncode == 18  # curl: the transfer was cut off


def test_a_reader_that_stops_reading_is_given_up(folder: Path) -> None:
    flags = ["--set", "limits.write_seconds=0.5", "limits.max_new_tokens=90"]
    with serving(str(folder), "--replicas", "1", *flags) as server:
        body = {**LONG, "n": 16, "logprobs": 20, "stream": True, "num_loops": 1}
        connections = []
        for _ in range(3):
            connection = _connect(server, body)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connections.append(connection)
        # Others are served meanwhile, and the work of the silent ones ends.
        assert len(server.complete(max_tokens=5, ignore_eos=True)) > 0
        wait_for(lambda: server.get("/engine")["rows"] == [], 30)
        for connection in connections:
            connection.close()


def test_a_key_is_needed_where_one_is_set(folder: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("# of the team\none\ntwo\n")
    arguments = (str(folder), "--replicas", "1", "--api-key-file", str(keys))
    with serving(*arguments) as server:
        assert server.ask("/v1/models")[0] == 401
        assert server.ask("/v1/models", authorization="Bearer three")[0] == 401
        assert server.ask("/v1/models", authorization="Bearer two")[0] == 200
        assert server.ask("/health")[0] == 200


def _fails(*arguments: str) -> str:
    server = Server(*arguments)
    assert server.ended(180) in (1, 2)
    (line,) = [line for line in server.log if line.startswith("error: ")]
    return line


def test_what_cannot_be_served_is_one_line(folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"port = {port}: cannot listen" in _fails(str(folder), "--port", port)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (damaged / name).write_bytes((folder / name).read_bytes())
    weights = (folder / "model.safetensors").read_bytes()
    (damaged / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    assert "damaged" in _fails(str(damaged))
    nan = weights[:-4] + b"\xff\xff\xff\x7f"
    (damaged / "model.safetensors").write_bytes(nan)
    assert "values that are not finite" in _fails(str(damaged), "--replicas", "1")
    assert "api_key_file" in _fails(str(folder), "--api-key-file", os.devnull)
    wrong = Server(str(folder), "--replicas", "1", "--precision", "fp8")
    assert wrong.ended(180) == 2 and len(wrong.log) == 2
    assert wrong.log[1].startswith("error: precision = 'fp8': must be one of")


def test_load_beyond_what_fits_is_refused_and_the_rest_is_served(folder: Path) -> None:
    flags = ("--replicas", "1", "--set", "limits.max_requests=8")
    with serving(str(folder), *flags) as server:
        canary = server.complete(max_tokens=6)
        counts: dict[int, int] = {}
        lock = threading.Lock()

        def client(number: int) -> None:
            for turn in range(6):
                body = {"prompt": "ab", "max_tokens": 20, "num_loops": 1 + (number + turn) % 8}
                status, _ = server.ask("/v1/completions", body)
                with lock:
                    counts[status] = counts.get(status, 0) + 1

        with ThreadPoolExecutor(24) as threads:
            list(threads.map(client, range(24)))
        assert set(counts) == {200, 429} and counts[200] > 20
        assert server.complete(max_tokens=6) == canary
        assert server.get("/engine")["rows"] == []
