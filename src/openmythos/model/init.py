"""All initialisation, as one table.

`dim` is the model width, `fan_in` the input width of a map. Sources: [P] Parcae (arXiv 2604.12946),
[L] Hu et al. 2021 (LoRA), [T] Takase et al. 2023 (scaled embedding); "trunc" is a normal truncated
at three standard deviations.

| parameters                                | distribution                       | source |
|-------------------------------------------|------------------------------------|--------|
| embed, head                               | trunc, std sqrt(2 / (5 dim))       | [P]    |
| output projections of residual branches   | 0, or trunc as the other maps      | [P]    |
| linear maps, experts                      | trunc, std sqrt(2 / (5 fan_in))    | [P]    |
| router                                    | trunc, std sqrt(2 / (5 fan_in))    | [P]    |
| norms                                     | 1                                  |        |
| LTI log_rate, raw_step_size               | so that decay = init_decay, gain 1 | [P]    |
| LTI input_map                             | 1, or the identity                 | [P]    |
| Concat state_map, input_map               | trunc as linear maps               |        |
| halting weight, bias                      | 0, bias_init                       |        |
| loop embedding                            | trunc, std of the embedding        |        |
| LoopLoRA down, up                         | trunc as linear maps, 0            | [L]    |
| router_bias                               | 0                                  |        |
"""

import math
from collections.abc import Callable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openmythos.model.config import MythosConfig
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.injection import LTI

Fill = Callable[[Tensor, torch.Generator | None], None]


def _trunc(std: float) -> Fill:
    def fill(x: Tensor, generator: torch.Generator | None) -> None:
        nn.init.trunc_normal_(x, std=std, a=-3 * std, b=3 * std, generator=generator)

    return fill


def _linear(x: Tensor, generator: torch.Generator | None) -> None:
    _trunc(math.sqrt(2 / (5 * x.shape[-1])))(x, generator)


def _constant(value: float) -> Fill:
    def fill(x: Tensor, generator: torch.Generator | None) -> None:
        nn.init.constant_(x, value)

    return fill


def _identity(x: Tensor, generator: torch.Generator | None) -> None:
    if x.ndim == 1:
        nn.init.ones_(x)
    else:
        nn.init.eye_(x)


def init_table(config: MythosConfig) -> list[tuple[str, Fill]]:
    """(name pattern, fill), the first match counts; every parameter and buffer matches a row."""
    embedding = _trunc(math.sqrt(2 / (5 * config.dim)))
    lti = config.injection if isinstance(config.injection, LTI) else LTI()
    # decay = max_decay * exp(-exp(log_rate) * step) = init_decay, with rate = 1 in all.
    step = -math.log(lti.init_decay)
    log_rate = math.log(1 + math.log(lti.max_decay) / step)
    halt_bias = config.halting.bias_init if isinstance(config.halting, ACT) else 0.0
    branch = _constant(0.0) if config.zero_init_outputs else _linear
    return [
        ("embed.weight", embedding),
        ("head.weight", embedding),
        ("*norm.weight", _constant(1.0)),
        ("*.router.router_bias", _constant(0.0)),
        ("*.conditioning.lora.down.*", _linear),
        ("*.conditioning.lora.up.*", _constant(0.0)),
        ("*.conditioning.embedding.table", embedding),
        ("*.injection.log_rate", _constant(log_rate)),
        ("*.injection.raw_step_size", _constant(math.log(math.expm1(step)))),
        ("*.injection.input_map", _identity),
        ("*.halting.weight", _constant(0.0)),
        ("*.halting.bias", _constant(halt_bias)),
        ("*.attention.output.weight", branch),
        ("*.feed_forward.*down*", branch),
        ("*.weight", _linear),
        ("*.experts.gate_up", _linear),
    ]


@torch.no_grad()
def init_weights(
    model: nn.Module, config: MythosConfig, generator: torch.Generator | None = None
) -> None:
    """Fill every parameter and buffer of the model by the table above.

    One in shards, or not where the generator is, gets its part of the numbers that it would get
    whole and there, which are made and dropped for one parameter at a time.
    """
    table = init_table(config)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        fill = next((fill for pattern, fill in table if fnmatchcase(name, pattern)), None)
        assert fill is not None, f"no row of the initialisation table matches {name}"
        if generator is None or (tensor.device == generator.device and type(tensor) is not DTensor):
            fill(tensor, generator)
        else:
            _fill_part(tensor, fill, generator)


def _fill_part(x: Tensor, fill: Fill, generator: torch.Generator) -> None:
    """Make all numbers of a parameter and keep those of this shard, which is of some rows."""
    everything = torch.empty(x.shape, dtype=x.dtype, device=generator.device)
    fill(everything, generator)
    if not isinstance(x, DTensor):
        x.copy_(everything)
        return
    local = x.to_local()
    _, offset = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
    assert local.shape[1:] == x.shape[1:]
    if len(local):
        local.copy_(everything[offset[0] : offset[0] + len(local)])
