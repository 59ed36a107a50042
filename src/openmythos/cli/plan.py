"""The commands about model configs: what a config costs, and the named presets."""

# Each `run` imports what it needs: torch takes seconds, and flags are parsed without it.

from dataclasses import dataclass
from typing import Annotated, Any

import tyro
from rich.table import Table

from openmythos.cli.flags import Changes, flat, shown
from openmythos.cli.screen import OUT, print_fit, print_plan, short
from openmythos.config import apply_overrides, require_int, require_number, to_dict

MAX_GIB = 2.0**20


@dataclass(frozen=True)
class Plan:
    """What a preset costs: parameters, KV cache, FLOPs, training memory; nothing is allocated."""

    preset: tyro.conf.Positional[Annotated[str, shown("PRESET")]]
    """Preset name; see `openmythos presets`."""
    context: Annotated[int | None, shown("N", "the preset's")] = None
    """Tokens per sequence."""
    batch: int = 1
    """Sequences."""
    num_loops: Annotated[int | None, shown("N", "the preset's")] = None
    """Loops."""
    set: Changes = ()
    """Changes to the preset, such as recurrent_feed_forward.top_k=4."""
    gpus: int = 0
    """Find the settings with which training fits this many devices; --batch is then per device."""
    memory: float = 80.0
    """GiB of each device, with --gpus."""
    backprop_loops: int = 0
    """Train with gradients through the last N loops of each sequence only (0: all)."""

    def run(self) -> None:
        from openmythos.model import presets
        from openmythos.planning import cost, fit

        config = apply_overrides(presets.get(self.preset), flat(self.set))
        require_int("gpus", self.gpus, minimum=0)
        require_number("memory", self.memory, above=0, at_most=MAX_GIB)
        names = ("context", "batch", "num_loops", "backprop_loops")
        shape: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.gpus:
            memory = round(self.memory * 2**30)
            print_fit(self.preset, fit.find(config, gpus=self.gpus, memory=memory, **shape))
        else:
            print_plan(self.preset, cost.plan(config, **shape))


@dataclass(frozen=True)
class Presets:
    """List the named model configs."""

    def run(self) -> None:
        from openmythos.model import presets
        from openmythos.planning import cost

        table = Table("preset", "parameters", "active", "width", "loops", "context", "experts")
        for name in presets.names():
            config = presets.get(name)
            count = cost.parameters(config)
            experts = to_dict(config)["recurrent_feed_forward"].get("num_experts", "-")
            cells = (name, short(count.total), short(count.active), config.dim)
            table.add_row(*map(str, (*cells, config.num_loops, f"{config.context:,}", experts)))
        OUT.print(table)
