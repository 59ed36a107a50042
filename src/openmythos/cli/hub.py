"""The commands about checkpoints of others: import, info; and what other commands do with them."""

# Each `run` imports what it needs: torch takes seconds, and flags are parsed without it.

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.table import Table

from openmythos.cli.flags import ModelSource, flat, shown
from openmythos.cli.screen import OUT, short
from openmythos.config import require

if TYPE_CHECKING:
    from openmythos.hub.load import Source
    from openmythos.model.config import MythosConfig

TEXT_LOOPS = (1, 2, 4, 8, 16)
Keys = Annotated[
    tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]],
    shown("KEY ...", "", "Keys of its config.json that are known not to change the logits."),
]


@dataclass(frozen=True)
class Import:
    """Convert a public checkpoint to a model folder of this package, with its tokenizer."""

    source: ModelSource
    out: Annotated[str, shown("FOLDER")]
    """Folder to create: config.json, model.safetensors, tokenizer.json."""
    dtype: Annotated[str, shown("KIND", "the checkpoint's")] = "keep"
    """Of the weights: fp32, bf16, fp16 or keep."""
    ignore: Keys = ()

    def run(self) -> None:
        import torch

        from openmythos.hub import convert
        from openmythos.hub.load import open_source
        from openmythos.planning import cost

        dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        known = self.dtype in (*dtypes, "keep")
        require(known, "dtype", self.dtype, f"must be {', '.join(dtypes)} or keep")
        source = open_source(self.source, ignore=flat(self.ignore))
        out = Path(self.out)
        require(not out.exists(), "out", self.out, "exists already")
        convert.write(source, source.load(dtype=dtypes.get(self.dtype)), out)
        size = short(cost.parameters(source.config).total)
        OUT.print(f"{self.out}: {source.format.family}, {size} parameters")


@dataclass(frozen=True)
class Info:
    """What a model is: family, sizes, loops, cache, licence, whether it loads."""

    source: ModelSource
    ignore: Keys = ()

    def run(self) -> None:
        from openmythos.hub.info import describe
        from openmythos.hub.load import open_source

        table = Table(self.source, "", show_header=True)
        for name, text in describe(open_source(self.source, ignore=flat(self.ignore))).items():
            table.add_row(name, text)
        OUT.print(table)


def config_of(name: str) -> "MythosConfig":
    """The config of a preset, or of a folder, GGUF file or Hub id."""
    from openmythos.hub.load import open_source
    from openmythos.model import presets

    is_path = "/" in name or Path(name).exists()
    return (
        open_source(name).config if is_path and name not in presets.names() else presets.get(name)
    )


def score(
    source: "Source",
    loops: tuple[int, ...] | None,
    data: tuple[str, ...],
    out: str,
    **chosen: Any,
) -> None:
    """Score text with a model that is not a run of this package, and write a report."""
    from openmythos.cli.jobs import print_report
    from openmythos.recipes import report

    name = source.path.resolve().stem
    require(len(data) > 0, "data", data, f"must be given: {name} is not a run")
    own = source.config.num_loops
    if loops is None:
        loops = (1,) if own == 1 else tuple(sorted({*TEXT_LOOPS, own}))
    folder = Path(out or f"eval/{name}")
    found = print_report(partial(report.evaluate_text, source, loops, data=data, **chosen))
    report.write_report(found, folder)
    OUT.print(f"\nWritten: {folder}/eval.json, loops.png, loops.csv")
