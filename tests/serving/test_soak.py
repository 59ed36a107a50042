"""Mixed load for minutes: memory and file descriptors stay flat, nothing is left behind.

OPENMYTHOS_SOAK_SECONDS sets how long; an hour by hand before a release.
"""

import contextlib
import json
import os
import random
import socket
import threading
import time
from pathlib import Path
from statistics import linear_regression
from typing import Any
from urllib.parse import urlsplit

import pytest
from serving.running import Server, serving, wait_for

pytestmark = pytest.mark.slow
SECONDS = float(os.environ.get("OPENMYTHOS_SOAK_SECONDS", "600"))
CLIENTS = 12
RULES = ("fixed", "kl", "state_change")


def body_of(dice: random.Random) -> dict[str, Any]:
    """Short and long, shallow and deep, with everything that a request can have."""
    body: dict[str, Any] = {
        "prompt": "x" * dice.choice((1, 5, 40)),
        "max_tokens": dice.choice((1, 8, 40)),
        "num_loops": dice.choice((1, 2, 4, 16)),
        "exit_rule": dice.choice(RULES),
        "seed": dice.randrange(1000),
        "n": dice.choice((1, 1, 1, 4)),
        "stream": dice.random() < 0.5,
    }
    body |= {"logprobs": 3, "echo": True} if dice.random() < 0.2 else {}
    return body | ({"stop": ["e", "th"]} if dice.random() < 0.2 else {})


class Clients:
    """Closed-loop clients; every other one leaves in the middle of an answer."""

    def __init__(self, server: Server) -> None:
        self.server, self.ended = server, threading.Event()
        # The server's own limit: where other work takes the cores, some answers take a minute.
        server.patience = 600
        self.counts: dict[str, int] = {}
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(CLIENTS)]
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        self.ended.set()
        for thread in self._threads:
            thread.join()

    @property
    def total(self) -> int:
        """Requests that have been made."""
        with self._lock:
            return sum(self.counts.values())

    def _run(self, number: int) -> None:
        dice = random.Random(number)
        while not self.ended.is_set():
            body = body_of(dice)
            outcome = self._leave(body, dice) if number % 2 else self._ask(body)
            with self._lock:
                self.counts[outcome] = self.counts.get(outcome, 0) + 1

    def _ask(self, body: dict[str, Any]) -> str:
        body["stream"] = False
        return str(self.server.ask("/v1/completions", body)[0])

    def _leave(self, body: dict[str, Any], dice: random.Random) -> str:
        where, data = urlsplit(self.server.url), json.dumps(body)
        head = f"Host: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        with (
            contextlib.suppress(OSError),
            socket.create_connection((where.hostname, where.port)) as c,
        ):
            c.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n{data}".encode())
            c.settimeout(dice.random() * 0.5 + 0.01)
            c.recv(1)
        return "left"


def files(server: Server) -> int:
    """Open file descriptors of the server process."""
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


class Memory:
    """What each process held, and how many requests had been made, at several times."""

    def __init__(self) -> None:
        self._requests: list[int] = []
        self._bytes: dict[str, list[int]] = {}

    def add(self, requests: int, held: dict[str, int]) -> None:
        self._requests.append(requests)
        for name, one in held.items():
            self._bytes.setdefault(name, []).append(one)

    def growth(self) -> dict[str, float]:
        """By process: by which share of what it held at first it grows, along a fitted line."""
        made = self._requests[-1] - self._requests[0]
        return {
            name: linear_regression(self._requests, held).slope * made / held[0]
            for name, held in self._bytes.items()
        }


def test_nothing_grows_and_nothing_is_left(folder: Path) -> None:
    """Memory is judged in the second half of the time; the first half is a warm-up.

    In it caches of a fixed size fill: 128 compiled products of matrices in each of two places (see
    `machine.bound_product_caches`), which a busy machine has met after 4 minutes; and the heaps
    reach the size of the busiest moments. Then the line fitted to what a process holds over the
    number of requests says by how much it grows. Two values alone would say at which point between
    two garbage collections, or before or after which busy moment, they were taken.
    """
    with serving(str(folder), "--replicas", "2") as server:
        canary = server.complete(max_tokens=12, num_loops=5)
        clients, memory = Clients(server), Memory()
        began = time.monotonic()
        try:
            while time.monotonic() - began < SECONDS:
                time.sleep(min(SECONDS / 60, 10))
                assert server.complete(max_tokens=12, num_loops=5) == canary
                if time.monotonic() - began > SECONDS / 2:
                    memory.add(clients.total, server.memory())
        finally:
            clients.join()
        wait_for(lambda: server.get("/engine")["rows"] == [], 5)
        idle = server.get("/engine")
        assert (idle["pages_used"], idle["rows_waiting"]) == (0, 0)
        assert set(clients.counts) <= {"200", "429", "left"} and clients.counts["200"] > 20
        grown = memory.growth()
        assert len(grown) == 3 and max(grown.values()) < 0.03, grown
        wait_for(lambda: files(server) < 60, 10)
        assert all(x["restarts"] == 0 for x in server.get("/health")["replicas"])
