"""Only `kernels` knows how a formula is computed on a device."""

import ast
from pathlib import Path

import openmythos

ROOT = Path(openmythos.__file__).parent
FILES = [path for path in sorted(ROOT.rglob("*.py")) if ROOT / "kernels" not in path.parents]
# What is no computation: devices themselves, checks that must not wait for one, communication.
ALLOWED = {
    "machine.py": {"device.type"},
    "model/inputs.py": {"device.type", "is_compiling"},
    "model/mythos.py": {"device.type"},
    "hub/export_model.py": {"device.type"},
    "train/trainer.py": {"device.type"},
    "train/precision.py": {"device.type"},
    "distributed/ranks.py": {"device.type"},
    "distributed/parallelize.py": {"device.type"},
    "distributed/expert_parallel.py": {"autograd.Function", "kernels.first_order"},
    "planning/cost.py": {"kernels.ACCELERATOR"},
}


def last_name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def knows_of_kernels(tree: ast.AST) -> set[str]:
    """What a file does that belongs to `kernels`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and "Function" in map(last_name, node.bases):
            found.add("autograd.Function")
        if isinstance(node, ast.Attribute):
            owner, name = last_name(node.value), node.attr
            if owner == "device" and name == "type":
                found.add("device.type")
            if owner == "kernels" and name != "use":
                found.add(f"kernels.{name}")
            if name in ("is_compiling", "custom_op") or (owner, name) == ("torch", "library"):
                found.add(name)
    return found


def test_nothing_else_chooses_how_to_compute() -> None:
    for path in FILES:
        name = path.relative_to(ROOT).as_posix()
        found = knows_of_kernels(ast.parse(path.read_text()))
        assert found <= ALLOWED.get(name, set()), name
