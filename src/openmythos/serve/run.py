"""The server as a program: port, signals, graceful end."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from openmythos.config import ConfigError, require, require_int
from openmythos.files import reading
from openmythos.inference.request import EngineLimits
from openmythos.serve import app, replicas
from openmythos.serve.guards import LOOPBACK
from openmythos.serve.limits import ServerLimits
from openmythos.serve.service import Service
from openmythos.serve.source import Served
from openmythos.serve.worker import Loader

KEY_VARIABLE = "OPENMYTHOS_API_KEY"
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A busy loop of OpenMP's waiting threads would take the cores of the other replicas.
_SPIN = ("GOMP_SPINCOUNT", "3000")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the server accepts, and what each engine holds."""

    limits: ServerLimits = field(default_factory=ServerLimits)
    engine: EngineLimits = field(default_factory=EngineLimits)


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """Where to listen, and what computes. `replicas` = 0: one for each core."""

    source: str = ""
    host: str = "127.0.0.1"
    port: int = 8000
    replicas: int = 0
    name: str = ""
    api_key_file: str = ""
    chat_template: str = ""
    device: str = "auto"
    precision: str = "auto"
    step: int | None = None
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        require_int("port", self.port, minimum=0, maximum=65535)
        require_int("replicas", self.replicas, minimum=0, maximum=1024)


def serve(options: ServerOptions, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C. `say` gets lines for the user: what is served, where, the end.

    The first signal lets accepted work finish, for `shutdown_seconds`; a second one ends it.
    Raises a ConfigError if the model cannot be loaded or the address cannot be had.
    """
    served = Served.open(options.source)
    served.source.check_names()
    os.environ.setdefault(*_SPIN)
    count = options.replicas or _cores()
    limits, engine = options.settings.limits, options.settings.engine
    loader = Loader(options.source, options.device, options.precision, options.step, engine)
    pool = replicas.Replicas(count, replicas.in_process(loader), limits)
    service = Service.open(
        served, pool, limits, name=options.name, chat_template=options.chat_template
    )
    keys = read_keys(options.api_key_file)
    hosts = LOOPBACK if _is_loopback(options.host) else None
    application = app.create(service, keys=keys, hosts=hosts)
    with _listen(options.host, options.port) as listener:
        config = uvicorn.Config(
            application,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=1,
        )
        # What is there now stays: collections need not look at it, and come more often.
        gc.collect()
        gc.freeze()
        say(_about(service))
        address = f"http://{_bracketed(options.host)}:{listener.getsockname()[1]}"
        asyncio.run(_Server(config, service, address, say).serve([listener]))


class _Server(uvicorn.Server):
    """uvicorn, which goes on answering while accepted work finishes."""

    def __init__(
        self, config: uvicorn.Config, service: Service, address: str, say: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self._service, self._address, self._say = service, address, say
        self._tasks: list[asyncio.Task[None]] = []
        self._failed: Exception | None = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._signalled)
        self._tasks.append(asyncio.create_task(self._wait_until_ready()))
        try:
            yield
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
        if self._failed is not None:
            raise self._failed

    async def _wait_until_ready(self) -> None:
        pool = self._service.replicas
        while not pool.ready:
            wrong = next((replica.load_error for replica in pool.all if replica.load_error), "")
            if wrong:
                self._failed = ConfigError(wrong)
            elif max(replica.restarts for replica in pool.all) >= 2:
                self._failed = OSError("no replica could load the model; see the messages above")
            if pool.draining or self._failed is not None:
                self.should_exit = True
                return
            await asyncio.sleep(0.05)
        self._say(f"serving at {self._address} (Ctrl-C ends)")

    def _signalled(self) -> None:
        pool = self._service.replicas
        if pool.draining:
            pool.fail_all("the server was stopped")
            self.should_exit = True
            return
        pool.draining = True
        self._say("finishing accepted work; Ctrl-C again ends it" if pool.busy else "ending")
        self._tasks.append(asyncio.create_task(self._drain()))

    async def _drain(self) -> None:
        pool = self._service.replicas
        end = time.monotonic() + self._service.limits.shutdown_seconds
        while pool.busy and time.monotonic() < end:
            await asyncio.sleep(0.05)
        pool.fail_all("the server was stopped")
        await asyncio.sleep(0.05)  # let the answers be written
        self.should_exit = True


def _about(service: Service) -> str:
    """What is served, in a line."""
    model, count = service.model, len(service.replicas.all)
    size = f"{model.parameters:,} parameters, trained with {model.num_loops} loops"
    return f"loading {model.id}: {size}; {count} {'replica' if count == 1 else 'replicas'}"


def read_keys(file: str) -> tuple[str, ...]:
    """The API keys of a file, one per line, or of the environment; () if there are none."""
    if not file:
        key = os.environ.get(KEY_VARIABLE, "").strip()
        return (key,) if key else ()
    with reading(file):
        text = Path(file).read_text(encoding="utf-8")
    lines = (line.strip() for line in text.splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    require(bool(keys), "api_key_file", file, "holds no key")
    return keys


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    """A listening socket; a one-line error if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"port = {port}: cannot listen on {host}: {error.strerror}"
            ) from error
        listener.listen(2048)
        yield listener
    finally:
        listener.close()


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _cores() -> int:
    """The cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
