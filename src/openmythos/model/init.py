"""Initialise a model's parameters as its modules state (`nn.facts`), sharded or not.

| parameters                                | distribution                       | source |
|-------------------------------------------|------------------------------------|--------|
| matrices, embedding, head, experts        | trunc, std sqrt(2 / (5 fan_in))    | [P]    |
| output maps of residual branches          | 0, or as the other matrices        | [P]    |
| norms                                     | 1                                  |        |
| LTI log_rate, raw_step_size               | so that decay = init_decay, gain 1 | [P]    |
| LTI input_map                             | 1, or the identity                 | [P]    |
| halting weight, bias                      | 0, bias_init                       |        |
| LoopLoRA down, up                         | as matrices, 0                     | [L]    |
| router_bias                               | 0                                  |        |

[P] Parcae (arXiv 2604.12946), [L] Hu et al. 2021 (LoRA); "trunc": normal, truncated at 3 standard
deviations.
"""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from openmythos.nn.facts import Fill, fills


@torch.no_grad()
def init_weights(
    model: nn.Module, *, zero_outputs: bool, generator: torch.Generator | None = None
) -> None:
    """Fill every parameter and buffer; `zero_outputs` starts every residual branch at zero.

    Sharded parameters: the full tensor is generated on the generator's device, this rank's shard is
    kept, the rest freed. Initial weights do not depend on the number of ranks.
    """
    tensors = dict((*model.named_parameters(), *model.named_buffers()))
    for name, fill in fills(model, zero_outputs=zero_outputs).items():
        tensor = tensors[name]
        if generator is None or (tensor.device == generator.device and type(tensor) is not DTensor):
            fill(tensor, generator)
        else:
            _fill_part(tensor, fill, generator)


def _fill_part(x: Tensor, fill: Fill, generator: torch.Generator) -> None:
    """Generate the full tensor and keep the rows of this rank's shard."""
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
