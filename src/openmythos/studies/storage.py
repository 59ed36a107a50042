"""results.json of a study: its runs and trials, and the verdict rule as it was before them."""

import ast
import hashlib
import inspect
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from openmythos.files import read_json, write_json
from openmythos.studies.study import Finding, RunResult, Study, Trial


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What results.json holds."""

    rule: Mapping[str, Any]  # of `rule_of`, before the first run
    hardware: Mapping[str, Any] = field(default_factory=dict)
    runs: Sequence[RunResult] = ()
    trials: Sequence[Trial] = ()
    finding: Finding | None = None


def rule_of(study: Study, machine: Mapping[str, Any]) -> dict[str, Any]:
    """The verdict rule in words, the commit it is of, and a hash of its code and bars.

    The hash covers `judge` without its docstring, and the module's constants.
    """
    module = inspect.getmodule(study.judge)
    assert module is not None
    code = [
        ast.dump(node)
        for node in ast.parse(inspect.getsource(module)).body
        if isinstance(node, ast.Assign | ast.AnnAssign) and "STUDY" not in ast.dump(node)
    ]
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(study.judge))).body
    assert isinstance(function, ast.FunctionDef)
    code += [ast.dump(node) for node in function.body[1:]]
    return {
        "words": inspect.getdoc(study.judge),
        "sha256": hashlib.sha256("\n".join(code).encode()).hexdigest()[:16],
        "commit": machine["commit"],
        "dirty": machine["dirty"],
    }


def load(path: Path) -> Stored | None:
    """What a results.json holds; None if there is none."""
    if not path.exists():
        return None
    data = read_json(path)
    finding = data["finding"]
    return Stored(
        rule=data["rule"],
        hardware=data["hardware"],
        runs=[RunResult(**run) for run in data["runs"]],
        trials=[Trial(**trial) for trial in data["trials"]],
        finding=None if finding is None else Finding(**finding),
    )


def save(out: Path, study: Study, stored: Stored) -> None:
    """Write out/results.json."""
    write_json(
        {
            "study": study.name,
            "claim": study.claim,
            "rule": stored.rule,
            "hardware": stored.hardware,
            "finding": None if stored.finding is None else asdict(stored.finding),
            "trials": [asdict(trial) for trial in stored.trials],
            "runs": [_as_json(result) for result in stored.runs],
        },
        out / "results.json",
    )


def _as_json(result: RunResult) -> dict[str, Any]:
    """A run, without what is not known of it."""
    optional = {"validation": None, "machine": ""}
    return {
        name: value
        for name, value in asdict(result).items()
        if name not in optional or value != optional[name]
    }
