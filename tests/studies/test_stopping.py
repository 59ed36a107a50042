"""The rule of the study on stopping, and its oracle."""

from collections.abc import Mapping
from typing import Any

from studies.made_up import two_runs

from openmythos import OpenMythos
from openmythos.studies import stopping
from openmythos.studies.study import RunResult


def made_up(
    excess: float, accuracy: float = 1.0, *, frozen: float = 9.0, learned: float = 9.0
) -> list[RunResult]:
    """Rules for sequences use hops + excess loops, the others hops + frozen or hops + learned.

    The oracle stops one loop before the hops; a fixed number of loops solves what has fewer hops.
    """
    hops = [str(h) for h in stopping.HOPS]

    def curve(rules: Mapping[str, float]) -> dict[str, Any]:
        return {
            "rules": {
                rule: {h: [accuracy if "sequence" in rule else 1.0, int(h) + more] for h in hops}
                for rule, more in rules.items()
            },
            "fixed": {h: {str(n): float(n >= int(h)) for n in range(1, 81)} for h in hops},
            "oracle": {h: int(h) - 1.0 for h in hops},
            "all": dict.fromkeys(hops, 1.0),
        }

    rules = {n: excess if n.endswith("sequence") else frozen for n in stopping.rules()}
    arms = {stopping.LOOPED: curve(rules), "ACT": curve({stopping.LEARNED: learned})}
    return [run for name, found in arms.items() for run in two_runs(name, found)]


def test_stopping_is_judged_against_the_hops_the_oracle_and_fixed_loops() -> None:
    finding = stopping.judge(made_up(2.0, learned=2.0))
    assert finding.verdict == "holds"
    row = finding.table[0]
    # 23 loops in the mean: a fixed number that costs no more solves 5, 10 and 20 hops of five.
    assert row["of fixed loops at that cost [%]"] == "60.0 ± 0.0"
    assert row["mean loops"] == "23.0 ± 0.0" and row["above the oracle"] == "+3.0"
    assert stopping.judge(made_up(2.0)).verdict == "holds in part"  # no learned halt passes
    assert "2.5 loops above" not in finding.sentence
    late = stopping.judge(made_up(4.0, frozen=4.0))
    assert late.verdict == "does not hold here"  # two of five bars
    assert "(at most 3) (no)" in late.sentence
    assert stopping.judge(made_up(6.0)).verdict == "does not hold here"
    assert stopping.judge(made_up(2.0, accuracy=0.9)).verdict == "does not hold here"


def test_an_oracle_stops_where_the_answer_stays_right() -> None:
    """An answer that is right, wrong, and right again counts from the last."""
    arm = next(arm for arm in stopping.arms() if arm.name == "PonderNet")
    found = stopping.measure(OpenMythos(arm.quick().model, seed=0), arm.quick(), True)
    assert set(found["rules"]) == {stopping.LEARNED}
    for hops, row in found["fixed"].items():
        assert list(map(int, row)) == [1, 2, 3, 4, 5, 6]
        assert row["6"] == found["all"][hops] and 1 <= found["oracle"][hops] <= 6
        assert 1 <= found["rules"][stopping.LEARNED][hops][1] <= 6
