"""The goals of `bench.py` for workloads S and M, and which of them a run missed."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from roster import REFERENCE

OWN = "openmythos-fp32"
COMPILED = "openmythos-compiled"
TORCH = ("openmythos-torch", COMPILED)  # no native kernel
FP32 = (OWN, *TORCH)
BF16 = ("openmythos-bf16", "openmythos-bf16-compiled")
WEIGHTS = ("openmythos-bf16-weights",)


@dataclass(frozen=True)
class Floor:
    """The best of some contenders must be so many times as fast as the reference on (S, M).

    None: no goal. `kinds`: of processors that it is meant for; none: all.
    """

    contenders: tuple[str, ...]
    figure: str
    times: tuple[float | None, float | None]
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Check:
    """A goal and what was measured: times the reference, a share, or seconds."""

    goal: str
    bound: float
    value: float
    best: str  # of the contenders
    unit: Literal["x", "%", " s"] = "x"
    at_most: bool = False

    @property
    def met(self) -> bool:
        return self.value <= self.bound if self.at_most else self.value >= self.bound

    def shown(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{value:.3g}{self.unit}"


FLOORS = (
    Floor(FP32, "decode, batch 1", (12, 5.5)),
    Floor(FP32, "decode, batch 8", (14, 8)),
    Floor(WEIGHTS, "decode, batch 1", (None, 8)),
    Floor(WEIGHTS, "decode, batch 8", (None, 10)),
    Floor(TORCH, "decode, batch 1", (6, None)),
    Floor(TORCH, "decode, batch 8", (7, None)),
    Floor(FP32, "training step", (1.4, 1.4)),
    Floor(BF16, "training step", (2.0, 2.3)),
    Floor(FP32, "prefill, batch 8", (3.7, 1.4), kinds=("avx2", "avx2-xeon")),
)
# Least share of the bound of training (on AVX2) and of a decoded token (of M: reread).
TRAINING_SHARES = {"S": 0.60, "M": 0.65}
DECODING_SHARE = 0.40
FIRST_TOKEN = 1.0  # seconds, in a process that did not compile the code
MEMORY_CEILING = 0.7  # of the reference's peak in a training step


def checks(result: dict[str, Any], kind: str) -> Iterator[Check]:
    """The goals that a result has measured values for; they are meant for one thread of a CPU."""
    workload = result["workload"]["name"]
    if workload not in TRAINING_SHARES or result["threads"] != 1 or result.get("device") == "cuda":
        return
    for floor in FLOORS:
        goal = floor.times["SM".index(workload)]
        ratios = result["ratio"].get(floor.figure, {})
        best = max(set(ratios) & set(floor.contenders), key=lambda name: ratios[name], default="")
        if best and goal is not None and (not floor.kinds or kind in floor.kinds):
            names = ", ".join(name.removeprefix("openmythos-") for name in floor.contenders)
            yield Check(f"{floor.figure} ({names})", goal, ratios[best], best)
    yield from _shares(result, workload, kind)
    first = result["first_call_seconds"].get("decode, batch 1", {}).get(COMPILED)
    if first is not None:
        yield Check("first compiled token, code cached", FIRST_TOKEN, first, COMPILED, " s", True)
    memory = result.get("peak_megabytes", {})
    if REFERENCE in memory and OWN in memory:
        ratio = memory[OWN] / memory[REFERENCE]
        yield Check("peak memory of a training step", MEMORY_CEILING, ratio, OWN, at_most=True)


def _shares(result: dict[str, Any], workload: str, kind: str) -> Iterator[Check]:
    share = result["share_of_bound"].get("training step", {}).get(OWN)
    if share is not None and kind.startswith("avx2"):
        yield Check(
            "share of the fp32 peak, training step", TRAINING_SHARES[workload], share, OWN, "%"
        )
    # The layers of S fit into a processor's cache, so that its loops need not read them again.
    readings = "share_of_bound_reread" if workload == "M" else "share_of_bound"
    shares = result.get(readings, {}).get("decode, batch 1", {})
    best = max(set(shares) & set(FP32), key=lambda name: shares[name], default="")
    if best:
        yield Check("share of the bound, decode, batch 1", DECODING_SHARE, shares[best], best, "%")


def missed(results: list[dict[str, Any]], kind: str) -> list[str]:
    """A message for each goal that these results missed."""
    return [
        f"{result['workload']['name']}: {check.goal}: {check.shown(check.value)} of {check.best}, "
        f"goal {check.shown(check.bound)}"
        for result in results
        for check in checks(result, kind)
        if not check.met
    ]
