"""Low-rank changes of the shared linear maps, different in every loop.

Beyond the last trained loop the last pair is used again, so any number of loops is defined.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from openmythos.config import MAX_WIDTH, ConfigError, require_int
from openmythos.nn.facts import Fill, constant
from openmythos.nn.linear import Deltas, Linear, LowRank
from openmythos.recurrence.loop_sampling import MOST_LOOPS
from openmythos.types import LoopCounts


@dataclass(frozen=True, kw_only=True)
class NoLoopLoRA:
    """Every loop uses the same weights."""

    kind: Literal["none"] = "none"

    def build(self, layers: nn.ModuleList) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class LoopLoRA:
    """A low-rank change of linear maps per loop (Relaxed Recursive Transformers, 2410.20672).

    `targets` are names or shell patterns of the linear maps of a recurrent layer, for example
    "attention.output" or "attention.*".
    """

    kind: Literal["lora"] = "lora"
    rank: int = 4
    num_loops: int = 8
    targets: tuple[str, ...] = ("attention.query*", "attention.output")

    def __post_init__(self) -> None:
        require_int("rank", self.rank, minimum=1, maximum=MAX_WIDTH)
        require_int("num_loops", self.num_loops, minimum=1, maximum=MOST_LOOPS)

    def build(self, layers: nn.ModuleList) -> "LoopLoRALayer":
        return LoopLoRALayer(self, layers)


class LoopLoRALayer(nn.Module):
    """W_loop = W + up[loop] down[loop], with the last loop's pair for every loop beyond."""

    def __init__(self, config: LoopLoRA, layers: nn.ModuleList) -> None:
        super().__init__()
        self.num_loops = config.num_loops
        self.down = nn.ParameterDict()
        self.up = nn.ParameterDict()
        maps = {
            f"{index}.{name}": module
            for index, layer in enumerate(layers)
            for name, module in layer.named_modules()
            if isinstance(module, Linear)
        }
        for target in config.targets:
            chosen = {k: m for k, m in maps.items() if fnmatchcase(k.split(".", 1)[1], target)}
            if not chosen:
                known = sorted({key.split(".", 1)[1] for key in maps})
                raise ConfigError(
                    f"targets = {target!r}: names no linear map of a recurrent layer; "
                    f"known: {', '.join(known)}"
                )
            for key, linear in chosen.items():
                linear.delta_key = key
                shape = (config.num_loops, config.rank)
                # ParameterDict keys may not contain dots.
                name = key.replace(".", "/")
                self.down[name] = nn.Parameter(torch.empty(*shape, linear.in_features))
                self.up[name] = nn.Parameter(
                    torch.empty(config.num_loops, linear.out_features, config.rank)
                )

    def fills(self) -> dict[str, Fill]:
        return dict.fromkeys((f"up.{name}" for name in self.up), constant(0.0))

    def multiply_adds(self) -> int:
        """Multiply-adds per token and loop."""
        return sum(weight.numel() for weight in self.parameters()) // self.num_loops

    def forward(self, loop: int | LoopCounts) -> Deltas:
        """The deltas of a loop; with a batch dimension for loop indices [batch]."""
        last = self.num_loops - 1
        if isinstance(loop, Tensor):
            rows = loop.clamp_max(last)
            return {
                name.replace("/", "."): LowRank(self.down[name], self.up[name], rows)
                for name in self.down
            }
        index = min(loop, last)
        return {
            name.replace("/", "."): LowRank(self.down[name][index], self.up[name][index])
            for name in self.down
        }


LoopLoRAs = NoLoopLoRA | LoopLoRA
