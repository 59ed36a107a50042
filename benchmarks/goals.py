"""The goals of `bench.py` for workloads S and M, and which of them a run missed."""

from typing import Any

from contenders import REFERENCE

FP32 = ("openmythos-fp32", "openmythos-compiled")
BF16 = ("openmythos-bf16", "openmythos-bf16-compiled")
# Goals: (contenders, figure, speed-up of the best of them over the reference on (S, M)).
FLOORS = (
    (FP32, "training step", (1.35, 1.4)),
    (BF16, "training step", (2.0, 2.3)),
    (FP32, "prefill, batch 8", (2.3, 1.4)),
    (FP32 + BF16, "decode, batch 1", (2.5, 2.5)),
    (FP32 + BF16, "decode, batch 8", (5.0, 4.0)),
)
PEAK_FLOORS = {"S": 0.60, "M": 0.65}
MEMORY_CEILING = 0.7


def check_floors(results: list[dict[str, Any]]) -> list[str]:
    """A message for each goal that this run on a CPU missed or did not measure."""
    missed = []

    def expect(fits: bool, text: str) -> None:
        if not fits:
            missed.append(text)

    for result in results:
        base = result["workload"]["name"]
        if base not in PEAK_FLOORS or result.get("device", "cpu") != "cpu":
            continue
        where = f"{base}, {result['threads']} thread(s)"
        for names, figure, floors in FLOORS:
            ratios = {
                name: ratio for name, ratio in result["ratio"][figure].items() if name in names
            }
            floor = floors[0 if base == "S" else 1]
            if ratios:
                name = max(ratios, key=lambda name: ratios[name])
                text = f"{where}: {figure} of {name} {ratios[name]:.2f}x < {floor}x"
                expect(ratios[name] >= floor, text)
        share = result["share_of_bound"]["training step"].get("openmythos-fp32")
        if share is not None:
            text = f"{where}: fp32 training at {share:.0%} of peak < {PEAK_FLOORS[base]:.0%}"
            expect(share >= PEAK_FLOORS[base], text)
        memory = result.get("peak_megabytes", {})
        if REFERENCE in memory and "openmythos-fp32" in memory:
            ratio = memory["openmythos-fp32"] / memory[REFERENCE]
            text = f"{where}: peak memory {ratio:.2f}x > {MEMORY_CEILING}x"
            expect(ratio <= MEMORY_CEILING, text)
    return missed
