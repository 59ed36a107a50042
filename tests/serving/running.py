"""`openmythos serve` in a process of its own, for tests with real clients."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

ROOT = Path(__file__).parents[2]


class Server:
    """A running server; `log` has the lines that it printed, `errors` may go elsewhere."""

    def __init__(
        self, *arguments: str, errors: int | IO[str] = subprocess.STDOUT, **environment: str
    ) -> None:
        names = {"PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "openmythos", "serve", "--port", "0", *arguments],
            env=os.environ | names | environment,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        self.log: list[str] = []
        self.url = ""
        self.patience = 60.0  # seconds that `ask` waits for an answer
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            for line in lines:
                self.log.append(line)
                if found := re.search(r"serving at (http://\S+)", line):
                    self.url = found[1]

    def ended(self, seconds: float) -> int:
        """Its exit code, once it has ended and all its lines have been read."""
        code = self.process.wait(seconds)
        self._reader.join()
        return code

    def wait(self, seconds: float = 180) -> "Server":
        """Until it takes work."""
        wait_for(lambda: self.url or self.process.poll() is not None, seconds)
        assert self.url, "".join(self.log)
        return self

    def get(self, path: str) -> Any:
        """The JSON of a route, also of an error."""
        return self.ask(path)[1]

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """(status, JSON)"""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"content-type": "application/json"} | headers)
        try:
            with urlopen(request, timeout=self.patience) as answer:
                return answer.status, json.load(answer)
        except HTTPError as error:
            return error.code, json.load(error)

    def complete(self, prompt: str = "ab", **body: Any) -> str:
        """The text of a completion."""
        status, answer = self.ask("/v1/completions", {"prompt": prompt, "temperature": 0} | body)
        assert status == 200, answer
        text: str = answer["choices"][0]["text"]
        return text

    def children(self) -> list[int]:
        """The processes that it started and that hold a replica."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        pids = [int(pid) for task in tasks for pid in task.read_text().split()]
        return [pid for pid in pids if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def memory(self) -> dict[str, int]:
        """Bytes that the server and each of its replicas hold, without files that are mapped."""
        pids = {"server": self.process.pid}
        pids |= {f"replica {n}": pid for n, pid in enumerate(self.children())}
        return {name: _held(pid) for name, pid in pids.items()}


def _held(pid: int) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    found = dict(re.findall(r"(RssAnon|VmSwap):\s+(\d+) kB", text))
    return 1024 * sum(map(int, found.values()))


def wait_for(true: Any, seconds: float) -> None:
    """Poll until it is true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


@contextlib.contextmanager
def serving(
    *arguments: str, errors: int | IO[str] = subprocess.STDOUT, **environment: str
) -> Iterator[Server]:
    """A server that takes work; it is ended with the block."""
    server = Server(*arguments, errors=errors, **environment)
    try:
        yield server.wait()
    finally:
        server.process.send_signal(signal.SIGKILL)
        server.ended(60)
