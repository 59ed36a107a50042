"""The command that writes a trained model for other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from openmythos.cli.flags import Device, RunFolder, Step, shown
from openmythos.cli.screen import OUT, short
from openmythos.config import require, unknown_name


@dataclass(frozen=True)
class Export:
    """Write the model of a checkpoint to a folder, for this package or for transformers."""

    folder: RunFolder
    out: Annotated[str, shown("FOLDER")]
    """Folder to create: config.json, model.safetensors, tokenizer.json (for text)."""
    format: Annotated[str, shown("native|hf")] = "native"
    """native: for `OpenMythos.from_pretrained`; hf: for transformers, with code and model card."""
    license: Annotated[str, shown("NAME")] = "unknown"
    """Licence of the weights, for the model card."""
    step: Step = None
    device: Device = "cpu"

    def run(self) -> None:
        from openmythos.planning import cost
        from openmythos.train.run import Run

        allowed = unknown_name("choice", self.format, ("native", "hf"))
        require(self.format in ("native", "hf"), "format", self.format, allowed)
        run, out = Run.open(Path(self.folder)), Path(self.out)
        require(not out.exists(), "out", self.out, "exists already")
        model, step = run.load_checkpoint(self.device, step=self.step)
        if self.format == "hf":
            from openmythos.hub.export import Text, write
            from openmythos.hub.export_card import card
            from openmythos.train.config import TaskData

            data = run.config.data
            task = data.task if isinstance(data, TaskData) else None
            text = Text(tokenizer=run.text_tokenizer, task=task)
            write(model, out, text=text, card=card(run, model, step, licence=self.license))
        else:
            model.save_pretrained(out)
            if run.text_tokenizer is not None:
                run.text_tokenizer.save(out)
        size = short(cost.parameters(model.config).total)
        OUT.print(f"{out}: the model after {step} steps, {size}")
