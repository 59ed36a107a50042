"""The names of all contenders of `bench.py`, and which ones it times where."""

from contenders import Bf16Weights, Ours
from peers import DeepSeek, Reference
from yardsticks import LlamaCpp, StaticLlama

CONTENDERS = {
    "openmythos-fp32": lambda workload: Ours(workload, "fp32"),
    "openmythos-torch": lambda workload: Ours(workload, "fp32", forms="torch"),
    "openmythos-bf16-weights": Bf16Weights,
    "openmythos-bf16": lambda workload: Ours(workload, "bf16"),
    "openmythos-compiled": lambda workload: Ours(workload, "fp32", compiled=True),
    "openmythos-bf16-compiled": lambda workload: Ours(workload, "bf16", compiled=True),
    "open-mythos": Reference,
    "open-mythos-compiled": lambda workload: Reference(workload, compiled=True),
    "open-mythos-bf16": lambda workload: Reference(workload, "bf16"),
    "deepseek-v3": DeepSeek,
    "llama-static": StaticLlama,
    "llama.cpp": LlamaCpp,
}
OURS = tuple(name for name in CONTENDERS if name.startswith("openmythos"))
CPU_CONTENDERS = (
    *OURS,
    "open-mythos",
    "open-mythos-compiled",
    "deepseek-v3",
    "llama-static",
    "llama.cpp",
)
ONLY_CPU = ("openmythos-torch", "openmythos-bf16-weights")  # with and without the native kernel
GPU_CONTENDERS = (
    *(name for name in OURS if name not in ONLY_CPU),
    "open-mythos",
    "open-mythos-bf16",
    "llama-static",
)
REFERENCE, REFERENCE_BF16 = "open-mythos", "open-mythos-bf16"


def numbers_of(name: str) -> tuple[str, int]:
    """(limit of a contender's arithmetic, bytes of a weight and of a number in its cache)."""
    if "bf16" not in name:
        return "fp32", 4
    return ("fp32", 2) if "weights" in name else ("bf16", 2)
