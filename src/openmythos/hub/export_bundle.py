"""The code of an exported model, generated from the package's own sources.

transformers copies the modelling file of a model and the files that it names in relative imports of
the form `from .name import ...`, all in one folder. So every module of the package that the model
needs becomes one file beside it, reduced to the definitions that are used, with its imports
rewritten. Nothing else changes, and comments stay.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from openmythos import __version__

PACKAGE = "openmythos"
CONFIG_MODULE = f"{PACKAGE}.hub.export_config"
MODEL_MODULE = f"{PACKAGE}.hub.export_model"
# Where the parts of an export start, and the classes that users load.
ROOTS = (
    (CONFIG_MODULE, "OpenMythosConfig"),
    (MODEL_MODULE, "OpenMythosForCausalLM"),
    (MODEL_MODULE, "OpenMythosModel"),
)
_NAMES = {
    CONFIG_MODULE: "configuration_openmythos",
    MODEL_MODULE: "modeling_openmythos",
}
# A bundle has no C++ source, nor what would compile and call it: these functions return in it what
# they return where there is no compiler, and a class refuses to be made.
_WITHOUT_NATIVE = {
    f"{PACKAGE}.kernels.few_rows_native": {"accepts": "False", "accepts_input": "False"},
    f"{PACKAGE}.kernels.elementwise": {
        "accepts": "False",  # so that the others are never called
        **dict.fromkeys(("norm", "norm_backward", "gate", "gate_backward", "rotate"), "None"),
    },
    f"{PACKAGE}.kernels.few_keys": {"accepts": "False", "attention": "None"},
    f"{PACKAGE}.kernels.linear": {"linear": "F.linear(x, weight)"},
    f"{PACKAGE}.nn.few_rows": {"native_layer": "None"},
    f"{PACKAGE}.inference.native_step": {"native_step": "None"},
    f"{PACKAGE}.model.stages": {"Stages": "an engine needs the package openmythos"},
}
_SHAPES = "jaxtyping"  # its aliases are plain tensors in a bundle
_LICENCE = "SPDX-License-Identifier: Apache-2.0"


def file_name(module: str) -> str:
    """The name of a module in a bundle, without ".py"."""
    return _NAMES.get(module, module.replace(".", "_"))


class _Import(NamedTuple):
    """One name of an import statement: `from source import name as alias`."""

    source: str
    name: str  # empty: the module `source` itself
    alias: str


class _Module:
    """A module of the package, as a list of statements, and which of them are kept."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        text = _returning(path.read_text(encoding="utf-8"), _WITHOUT_NATIVE.get(name, {}))
        self.lines = text.splitlines()
        self.statements = ast.parse(text).body
        self.kept: set[int] = set()
        self.imports: set[_Import] = set()

    @cached_property
    def definitions(self) -> dict[str, int]:
        """The statement that defines each top-level name, the last if there are several."""
        return {name: i for i, node in enumerate(self.statements) for name in _defined(node)}

    @cached_property
    def imported(self) -> dict[str, _Import]:
        """The names that import statements bind; those for type checkers only are left out."""
        found = (one for node in self.statements for one in _imports(node))
        return {one.alias: one for one in found}

    @cached_property
    def effects(self) -> list[int]:
        """Statements that run for their effect, such as the registration of an operator."""
        return [i for i, node in enumerate(self.statements) if _has_effect(node)]

    @property
    def docstring(self) -> str:
        """The lines of the module's docstring."""
        first = self.statements[0]
        is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        return "\n".join(self.lines[: first.end_lineno]) if is_text else ""

    def source(self, index: int) -> str:
        """A statement with its decorators and the comments above it."""
        before = self.statements[index - 1].end_lineno if index else 0
        return "\n".join(self.lines[before : self.statements[index].end_lineno])


def _returning(text: str, values: Mapping[str, str]) -> str:
    """A module's text in which some functions, by name, do nothing but return an expression.

    Of classes it is the message of the error that making one raises.
    """
    lines, nodes = text.splitlines(), ast.parse(text).body
    found = {node.name: node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    for node in sorted((found[name] for name in values), key=lambda node: -node.lineno):
        if isinstance(node, ast.ClassDef):
            lines[node.lineno - 1 : node.end_lineno] = (
                f"class {node.name}:",
                "    def __init__(self, *_: object) -> None:",
                f"        raise RuntimeError({values[node.name]!r})",
            )
            continue
        given, named = node.args, [f"{argument.arg}=None" for argument in node.args.kwonlyargs]
        rest = [f"*{given.vararg.arg}" if given.vararg else "*"] if given.vararg or named else []
        arguments = ", ".join([*(argument.arg for argument in given.args), *rest, *named])
        short = (f"def {node.name}({arguments}):", f"    return {values[node.name]}")
        lines[node.lineno - 1 : node.end_lineno] = short
    return "\n".join(lines)


def _imports(node: ast.stmt) -> Iterator[_Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield _Import(alias.name, "", alias.asname or alias.name.partition(".")[0])
    elif isinstance(node, ast.ImportFrom):
        for alias in node.names:
            yield _Import(str(node.module), alias.name, alias.asname or alias.name)


def _defined(node: ast.stmt) -> Iterator[str]:
    """The names that a statement binds, other than imports."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        for target in targets:
            yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))


def _has_effect(node: ast.stmt) -> bool:
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    return isinstance(node, ast.FunctionDef) and node.name == "_"


def _used(node: ast.AST) -> Iterator[tuple[str, str]]:
    """(name, attribute read from it or "") for every name that a statement reads."""
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            yield part.value.id, part.attr
        elif isinstance(part, ast.Name):
            yield part.id, ""
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield from _in_annotation(part.value)


def _in_annotation(text: str) -> Iterator[tuple[str, str]]:
    """The names of an annotation in quotes; those of other strings too, if they are expressions."""
    try:
        yield from _used(ast.parse(text, mode="eval"))
    except SyntaxError:
        return


class _Bundle:
    """Finds all definitions that the roots need."""

    def __init__(self) -> None:
        self.root = Path(__file__).parents[1]
        self.modules: dict[str, _Module] = {}

    def path(self, name: str) -> Path | None:
        """The file of a module of the package; None if there is no such module."""
        base = self.root.joinpath(*name.split(".")[1:])
        found = (base.with_suffix(".py"), base / "__init__.py")
        return next((path for path in found if path.is_file()), None)

    def module(self, name: str) -> _Module:
        if name not in self.modules:
            path = self.path(name)
            if path is None:
                raise ValueError(f"{name}: is not a module of {PACKAGE}")
            self.modules[name] = made = _Module(name, path)
            for index in made.effects:
                self.keep(made, index)
        return self.modules[name]

    def need(self, module: _Module, name: str, attribute: str = "") -> None:
        """Keep what defines `name` in a module, and all that this needs."""
        if name in module.definitions:
            self.keep(module, module.definitions[name])
        elif name in module.imported:
            self.follow(module, module.imported[name], attribute)

    def follow(self, module: _Module, one: _Import, attribute: str) -> None:
        """Keep an import, and what it imports from the package."""
        module.imports.add(one)
        if one.source.split(".")[0] != PACKAGE:
            return
        if not self.file(one):
            self.need(self.module(one.source), one.name)
            return
        whole = self.module(f"{one.source}.{one.name}".rstrip("."))
        if attribute:
            self.need(whole, attribute)

    def keep(self, module: _Module, index: int) -> None:
        if index in module.kept:
            return
        module.kept.add(index)
        for name, attribute in _used(module.statements[index]):
            self.need(module, name, attribute)

    def text(self, module: _Module) -> str:
        """The file of a module."""
        path = module.name.replace(".", "/")
        head = (
            f"# Generated by {PACKAGE} {__version__} from {path}.py; do not edit.\n# {_LICENCE}\n"
        )
        body = [self.statement(module, index) for index in sorted(module.kept)]
        imports = self.import_lines(module)
        if module.name == MODEL_MODULE:
            imports += self.whole_modules()
        parts = (head + module.docstring, imports, "\n".join(body))
        return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"

    def statement(self, module: _Module, index: int) -> str:
        """A statement as it is; an alias of a shape becomes a plain tensor."""
        node = module.statements[index]
        shape = isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)
        if not shape or not any(one.source == _SHAPES for one in module.imports):
            return module.source(index)
        assert isinstance(node, ast.Assign)
        return f"{ast.unparse(node.targets[0])} = Tensor  # {ast.unparse(node.value)}"

    def whole_modules(self) -> str:
        """Imports by name of the modules that others import as a whole."""
        found = {self.file(one) for module in self.modules.values() for one in module.imports}
        lines = [f"from .{file} import __name__ as _" for file in sorted(found - {""})]
        comment = "# transformers copies a file only if it is imported in this form."
        return "\n".join(("", comment, *lines))

    def file(self, one: _Import) -> str:
        """The file of a module of the package that is imported as a whole, else ""."""
        name = f"{one.source}.{one.name}".rstrip(".")
        whole = one.source.split(".")[0] == PACKAGE and self.path(name) is not None
        return file_name(name) if whole else ""

    def import_lines(self, module: _Module) -> str:
        """The imports of a file: other packages, then parts of the bundle."""
        by_source: dict[str, list[_Import]] = defaultdict(list)
        wholes = []
        for one in sorted(module.imports):
            if file := self.file(one):
                wholes.append(f"from . import {file} as {one.alias}")
            elif one.source != _SHAPES:
                own = one.source.split(".")[0] == PACKAGE
                by_source[f".{file_name(one.source)}" if own else one.source].append(one)
        lines = [line for source in by_source for line in _import_lines(source, by_source[source])]
        external = [line for line in lines if not line.startswith("from .")]
        return "\n".join((*external, "", *wholes, *(x for x in lines if x not in external)))


def _import_lines(source: str, names: Sequence[_Import]) -> Iterator[str]:
    for one in names:
        if not one.name:
            yield f"import {source}" + ("" if one.alias == source else f" as {one.alias}")
    some = [
        one.name if one.name == one.alias else f"{one.name} as {one.alias}"
        for one in names
        if one.name
    ]
    if some:
        line = f"from {source} import {', '.join(some)}"
        wrapped = f"from {source} import (\n    " + ",\n    ".join(some) + ",\n)"
        yield line if len(line) <= 100 else wrapped


@cache
def sources() -> dict[str, str]:
    """The files of a bundle by name; the same for the same version of the package."""
    bundle = _Bundle()
    for module, name in ROOTS:
        bundle.need(bundle.module(module), name)
    named = {
        f"{file_name(module.name)}.py": bundle.text(module) for module in bundle.modules.values()
    }
    return dict(sorted(named.items()))
