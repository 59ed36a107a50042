"""Prometheus metrics of the server and of what its replicas report."""

from collections.abc import Iterable
from dataclasses import fields

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from openmythos.inference.request import EngineStats
from openmythos.serve.replicas import Replicas

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_LOOPS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and histograms with a registry of their own."""

    def __init__(self, replicas: Replicas) -> None:
        self._registry = registry = CollectorRegistry()

        def histogram(name: str, text: str, buckets: Iterable[float]) -> Histogram:
            return Histogram(f"openmythos_{name}", text, buckets=tuple(buckets), registry=registry)

        self._requests = Counter(
            "openmythos_requests",
            "Requests for text by outcome.",
            ("route", "status"),
            registry=registry,
        )
        self._prompt_tokens = Counter(
            "openmythos_prompt_tokens", "Tokens of prompts.", registry=registry
        )
        self._tokens = Counter("openmythos_generated_tokens", "New tokens.", registry=registry)
        self._token_loops = Counter(
            "openmythos_token_loops", "Loops of all positions computed.", registry=registry
        )
        self._loops = histogram("loops_per_token", "Loops run for a new token.", _LOOPS)
        self._first = histogram(
            "time_to_first_token_seconds", "Seconds to the first token.", _SECONDS
        )
        self._between = histogram(
            "inter_token_latency_seconds", "Seconds between tokens.", _SECONDS
        )
        self._whole = histogram("request_seconds", "Seconds that whole requests took.", _SECONDS)
        registry.register(_ReplicaCollector(replicas))

    def token(self, loops: int, seconds: float, *, is_first: bool) -> None:
        """A new token, so many seconds after the one before, or after the request's arrival."""
        self._tokens.inc()
        self._loops.observe(loops)
        (self._first if is_first else self._between).observe(seconds)

    def request(self, route: str, status: int, seconds: float) -> None:
        """A request has been answered."""
        self._requests.labels(route, str(status)).inc()
        self._whole.observe(seconds)

    def usage(self, prompt_tokens: int, token_loops: int) -> None:
        """What a request for text used."""
        self._prompt_tokens.inc(prompt_tokens)
        self._token_loops.inc(token_loops)

    def text(self) -> bytes:
        """All metrics in the text format of Prometheus."""
        return generate_latest(self._registry)


class _ReplicaCollector(Collector):
    """Sums what the replicas reported last, at the time of the question."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def collect(self) -> Iterable[Metric]:
        every = self._replicas.all
        for name in (field.name for field in fields(EngineStats)):
            text = f"{name.replace('_', ' ').capitalize()} of all engines; reset with a replica."
            total = sum(getattr(replica.stats, name) for replica in every)
            yield GaugeMetricFamily(f"openmythos_engine_{name}", text, value=total)
        restarts = sum(max(replica.restarts, 0) for replica in every)
        ready = sum(replica.state == "ready" for replica in every)
        yield GaugeMetricFamily("openmythos_replica_restarts", "Restarts.", value=restarts)
        yield GaugeMetricFamily(
            "openmythos_replicas_ready", "Replicas that take work.", value=ready
        )
