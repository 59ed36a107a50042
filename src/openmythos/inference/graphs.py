"""How the regions of a decoding step run fast: as code compiled ahead of time, or as CUDA graphs.

Compiled code is kept in the user's cache folder. Its name depends on all that the code depends on,
which the values of weights are not: they are inputs. It serves any position, length and loop; one
row has code of its own, more rows share one.
"""

import functools
import hashlib
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from openmythos import files, kernels, machine
from openmythos.kernels.experts import FEW_TOKENS

LOGGER = logging.getLogger(__name__)
Region = Callable[..., Any]
SOURCES = Path(__file__).parents[1]
# Names of the dimensions that vary between calls, of inputs by name; others have ("rows",).
DIMS: Mapping[str, tuple[str | None, ...]] = {
    "kv": ("rows", "capacity"),
    "valid": ("rows", "capacity"),
    "keys": ("total",),
    "mask": ("rows", None, None, "total"),
    "decay": (),
}
# One row has code of its own, as have few rows (see `kernels.experts`) and many.
ROWS = ((1, 1), (2, FEW_TOKENS), (FEW_TOKENS + 1, 1 << 16))
OPTIONS = {"cpp.enable_floating_point_contract_flag": "fast"}


def fingerprint(model: nn.Module) -> tuple[Any, ...]:
    """Changes with the model's modules and where their tensors are, not with tensors' values."""
    modules = tuple((type(m), m.training) for m in model.modules())
    return modules, tuple((x.data_ptr(), x.dtype) for x in weights_of(model).values())


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return dict((*model.named_parameters(), *model.named_buffers()))


class Compiled:
    """Runs regions as code compiled by torch's AOTInductor, on a CPU.

    The first call of a region is eager: it shows which weights the region uses and what it returns.
    Where a region cannot be compiled, as without a C++ compiler, all its calls are eager.
    """

    fixed, bucket = False, 1

    def __init__(self, folder: Path, say: Callable[[str], None] = LOGGER.info) -> None:
        """`say` is called with a line before each compilation, and once if one fails."""
        self.folder, self._say = folder, say
        self._graphs: dict[Any, _Graph | None] = {}

    def __call__(self, region: Region, model: Any, /, **inputs: Any) -> Any:
        tensors: list[Tensor] = []
        shape = _collected(inputs, tensors)
        key = (region, _row_range(len(inputs["places"].tokens)), shape)
        if key not in self._graphs:
            return self._first_call(key, region, model, inputs)
        graph = self._graphs[key]
        # A copy of keys and values would lose what is written to them.
        if graph is None or not all(x.is_contiguous() for x in inputs["kv"]):
            return region(model, **inputs)
        return graph([x.contiguous() for x in tensors])  # the code knows of no other strides

    def _first_call(self, key: Any, region: Region, model: Any, inputs: dict[str, Any]) -> Any:
        with kernels.use("torch"), _UsedWeights(model) as used:  # no native call hides a weight
            out = region(model, **inputs)
        try:
            path = self._compiled(region, model, used.names, inputs)
            weights = [used.all[name] for name in used.names]
            self._graphs[key] = _Graph(path, weights, out)
        except Exception as error:  # whatever a compiler may raise
            self._graphs[key] = None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._say(f"decoding is not compiled ({region.__name__}): {lines[0]}")
        return out

    def _compiled(
        self, region: Region, model: Any, used: Sequence[str], inputs: dict[str, Any]
    ) -> Path:
        """The file of the compiled region; compiled now, unless there is one."""
        traced = _Traced(region, model, used, inputs)
        path = self.folder / f"decode-{region.__name__}-{traced.digest()}.pt2"
        if not path.exists():
            self._say(f"compiling {region.__name__} for decoding, once; kept in {self.folder}")
            self.folder.mkdir(parents=True, exist_ok=True)
            # Neither export nor compiler stand inference mode.
            with (
                torch.inference_mode(False),
                torch.no_grad(),
                kernels.use("torch"),
                warnings.catch_warnings(action="ignore"),  # torch's own, of its own names
                files.replacing(path) as temporary,
            ):
                traced.compile(temporary)
            machine.keep_recent(self.folder)
        machine.mark_used(path)
        return path


class _UsedWeights(TorchFunctionMode):
    """Records which parameters and buffers of a model are arguments of torch's functions."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.all = weights_of(model)
        self._names = {id(x): name for name, x in self.all.items()}
        self._seen: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in pytree.tree_leaves((args, kwargs)):
            if id(x) in self._names:
                self._seen.add(self._names[id(x)])
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return sorted(self._seen)


class _Graph:
    """A compiled region with its weights."""

    def __init__(self, path: Path, weights: list[Tensor], out: Any) -> None:
        """`out`: what the region returned; the graph returns the like."""
        # torch's own loader in Python imports the whole compiler, which takes seconds.
        self._loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, 1, -1)
        self._weights = weights
        self._out = _collected(out, [])

    def __call__(self, tensors: list[Tensor]) -> Any:
        found = self._loader.boxed_run([*self._weights, *tensors])
        return _rebuilt(self._out, iter(found))


# pytree does the same for any type, in ten times the time.
_TENSOR = object()


def _collected(x: Any, tensors: list[Tensor]) -> Any:
    """x with a mark in place of its tensors, which are appended; hashable."""
    if isinstance(x, Tensor):
        tensors.append(x)
        return _TENSOR
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, tuple | list):
        return x
    parts = [_collected(each, tensors) for each in x]
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


def _rebuilt(x: Any, tensors: Iterator[Tensor]) -> Any:
    """The inverse of `_collected`."""
    if x is _TENSOR:
        return next(tensors)
    if not isinstance(x, tuple):
        return x
    parts = [_rebuilt(each, tensors) for each in x]
    return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)


class _Traced(nn.Module):
    """A region as a function of tensors alone: the used weights, then those of its inputs."""

    def __init__(
        self, region: Region, model: Any, used: Sequence[str], inputs: dict[str, Any]
    ) -> None:
        super().__init__()
        leaves, self._spec = pytree.tree_flatten_with_path(inputs)
        self._region, self._used = region, list(used)
        self._model = [model]  # in a list: its weights are inputs, not parts of this module
        self._leaves = [x for _, x in leaves]
        self._weights = [weights_of(model)[name] for name in used]
        self._rows = len(inputs["places"].tokens)
        self._row_range = _row_range(self._rows)
        self._dims = [self._dims_of(path, x) for path, x in leaves if isinstance(x, Tensor)]

    def _dims_of(self, path: Any, x: Tensor) -> tuple[str | None, ...]:
        names = [getattr(entry, "name", getattr(entry, "key", None)) for entry in path]
        named = [name for name in (names[0], *names[::-1]) if isinstance(name, str)]
        dims = next((DIMS[name] for name in named if name in DIMS), ("rows",))
        if names[0] == "state":  # its keys and values are those of the new tokens alone
            dims = ("rows",)
        if self._rows == 1 or len(x) != self._rows:
            dims = tuple(None if name == "rows" else name for name in dims)
        return (*dims, *[None] * (x.ndim - len(dims)))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(self._used)
        weights = {f"model.{name}": x for name, x in zip(self._used, tensors, strict=False)}
        rest = iter(tensors[count:])
        leaves = [next(rest) if isinstance(x, Tensor) else x for x in self._leaves]
        inputs = pytree.tree_unflatten(leaves, self._spec)
        bound = _Bound(self._region, self._model[0])
        out = torch.func.functional_call(bound, weights, (inputs,))
        return tuple(x for x in pytree.tree_leaves(out) if isinstance(x, Tensor))

    def digest(self) -> str:
        """A name for the code: a hash of all that it depends on."""
        model, inputs = self._model[0], [x for x in self._leaves if isinstance(x, Tensor)]
        shapes = [
            [str(x.dtype), *(name or n for name, n in zip(dims, x.shape, strict=True))]
            for dims, x in zip(self._dims, inputs, strict=True)
        ]
        parts = [
            str(model.config),
            [f"{type(m).__module__}.{type(m).__qualname__} {m.training}" for m in model.modules()],
            [f"{x.dtype} {list(x.shape)}" for x in self._weights],
            self._used,
            shapes,
            self._row_range,
            str([x for x in self._leaves if not isinstance(x, Tensor)]),
            str(self._spec),
            torch.__version__,
            torch.get_num_threads(),
            machine.cpu_features(),
            OPTIONS,
            _sources(),
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]

    def compile(self, path: Path) -> None:
        """Write the compiled code to a file."""
        ranges = {"rows": self._row_range, "capacity": (2, 1 << 30), "total": (2, 1 << 30)}
        wanted = {name for names in self._dims for name in names if name}
        found = {n: torch.export.Dim(n, min=ranges[n][0], max=ranges[n][1]) for n in wanted}
        dims = [{i: found[n] for i, n in enumerate(names) if n} for names in self._dims]
        leaves = (x for x in self._leaves if isinstance(x, Tensor))
        tensors = [x.clone(memory_format=torch.contiguous_format) for x in leaves]
        shapes = ((*[{}] * len(self._weights), *dims),)
        program = torch.export.export(
            self,
            (*self._weights, *tensors),
            dynamic_shapes=shapes,
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,  # total <= capacity
        )
        target = str(path.with_suffix(".pt2"))
        made = torch._inductor.aoti_compile_and_package(
            program, package_path=target, inductor_configs=dict(OPTIONS)
        )
        Path(made).replace(path)


class _Bound(nn.Module):
    """A region bound to a model, whose weights can then be replaced in a call."""

    def __init__(self, region: Region, model: nn.Module) -> None:
        super().__init__()
        self.region, self.model = region, model

    def forward(self, inputs: dict[str, Any]) -> Any:
        return self.region(self.model, **inputs)


def _row_range(rows: int) -> tuple[int, int]:
    return next((low, high) for low, high in ROWS if low <= rows <= high)


@functools.cache
def _sources() -> str:
    """A hash of this package's own code."""
    digest = hashlib.sha256()
    for room in ("kernels", "nn", "recurrence", "inference", "model"):
        for path in sorted((SOURCES / room).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


class Captured:
    """Runs regions as CUDA graphs, one for each number of rows and multiple of `bucket` columns.

    A graph holds the addresses of weights and caches: only other inputs are copied into it.
    """

    fixed, bucket = True, 256

    def __init__(self) -> None:
        self._graphs: dict[Any, _CapturedGraph] = {}
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, region: Region, model: Any, /, **inputs: Any) -> Any:
        leaves = pytree.tree_leaves(inputs)
        rest = tuple(tuple(x.shape) if isinstance(x, Tensor) else x for x in leaves)
        key = (region, rest, tuple(x.data_ptr() for x in inputs.get("kv", ())))
        if key not in self._graphs:
            self._graphs[key] = _CapturedGraph(region, model, inputs, self._memory)
        return self._graphs[key]([x for x in leaves if isinstance(x, Tensor)])


class _CapturedGraph:
    def __init__(self, region: Region, model: Any, inputs: dict[str, Any], memory: Any) -> None:
        with torch.inference_mode(False):  # a call outside of it must be able to fill them
            own = {
                name: value if name == "kv" else pytree.tree_map_only(Tensor, Tensor.clone, value)
                for name, value in inputs.items()
            }
        self._inputs = [x for x in pytree.tree_leaves(own) if isinstance(x, Tensor)]
        # Libraries set themselves up in their first calls, which cannot be captured.
        stream, current = torch.cuda.Stream(), torch.cuda.current_stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(2):
                region(model, **own)
        current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=memory):
            self._out = region(model, **own)

    def __call__(self, tensors: list[Tensor]) -> Any:
        for own, x in zip(self._inputs, tensors, strict=True):
            if own is not x:
                own.copy_(x)
        self._graph.replay()
        # The next replay overwrites them.
        return pytree.tree_map_only(Tensor, Tensor.clone, self._out)
