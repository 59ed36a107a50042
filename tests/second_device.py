"""A second device for machines without one: tensors that refuse to meet those of the CPU.

Each wraps a tensor of the CPU and says that it lies on the meta device, which autograd takes for
one without streams. An operator that gets tensors of both raises, as it would with a GPU; so does
one that makes a tensor on the CPU where it belongs on the device.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FAR = torch.device("meta")
_MOVES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class FarTensor(Tensor):
    near: Tensor

    @staticmethod
    def __new__(cls, near: Tensor) -> "FarTensor":
        made = Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), dtype=near.dtype, device=FAR
        )
        made.near = near
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """What makes a tensor from nothing is told where."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = any(isinstance(x, FarTensor) for x in tensors)
    if kwargs.get("device") is not None:
        far = torch.device(kwargs["device"]).type == FAR.type
        kwargs = kwargs | {"device": torch.device("cpu")}
    elif not far:
        return func(*args, **kwargs)
    # A tensor of no dimension may come from the CPU, as with a GPU.
    stranger = any(not isinstance(x, FarTensor) and x.ndim > 0 for x in tensors)
    if far and stranger and func not in _MOVES:
        raise RuntimeError(f"{func}: gets tensors of both devices")
    near_args, near_kwargs = tree_map(
        lambda x: x.near if isinstance(x, FarTensor) else x, (args, kwargs)
    )
    out = func(*near_args, **near_kwargs)
    if not func._schema.returns:
        return None
    if func._schema.is_mutable and func._schema.name.endswith("_"):
        return args[0]
    return tree_map(lambda x: FarTensor(x) if isinstance(x, Tensor) and far else x, out)


def moved(model: nn.Module) -> nn.Module:
    """The model with its weights on the second device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(FarTensor(parameter.detach())))
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = FarTensor(buffer)
    return model


@contextmanager
def second_device(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where `moved` models can be run."""
    # Not known for the meta device; neither is used at fp32.
    patch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    patch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    # Tensors that wrap another cannot be made in inference mode.
    patch.setattr(torch, "inference_mode", torch.no_grad)
    # torch.optim hides its modules behind names of their own.
    adam = importlib.import_module("torch.optim.adam")
    patch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    # It asks no operator.
    original = torch.tensor

    def tensor(data: Any, *, device: Any = "cpu", **options: Any) -> Tensor:
        near = original(data, **options)
        return FarTensor(near) if torch.device(device) == FAR else near

    patch.setattr(torch, "tensor", tensor)
    with _Factories():
        yield
