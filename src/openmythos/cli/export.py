"""The command that writes a trained model for other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from openmythos.cli.flags import Device, RunFolder, Step, shown
from openmythos.cli.screen import OUT, short
from openmythos.config import require, unknown_name

if TYPE_CHECKING:
    from openmythos.model.mythos import OpenMythos
    from openmythos.train.run import Run

FORMATS = ("native", "hf", "lm-eval")


@dataclass(frozen=True)
class Export:
    """Write the model of a checkpoint to a folder, or its evaluation as tasks of lm-eval."""

    folder: RunFolder
    out: Annotated[str, shown("FOLDER")]
    """Folder to create: config.json, model.safetensors, tokenizer.json (for text)."""
    format: Annotated[str, shown("native|hf|lm-eval")] = "native"
    """native: for `OpenMythos.from_pretrained`; hf: for transformers; lm-eval: tasks, no model."""
    license: Annotated[str, shown("NAME")] = "unknown"
    """Licence of the weights, for the model card."""
    step: Step = None
    device: Device = "cpu"

    def run(self) -> None:
        from openmythos.planning import cost
        from openmythos.train.run import Run

        allowed = unknown_name("choice", self.format, FORMATS, as_listed=True)
        require(self.format in FORMATS, "format", self.format, allowed)
        run, out = Run.open(Path(self.folder)), Path(self.out)
        require(not out.exists(), "out", self.out, "exists already")
        if self.format == "lm-eval":
            self._write_tasks(run, out)
            return
        model, step = run.load_checkpoint(self.device, step=self.step)
        if self.format == "hf":
            self._write_for_transformers(run, model, step, out)
        else:
            model.save_pretrained(out)
            if run.text_tokenizer is not None:
                run.text_tokenizer.save(out)
        size = short(cost.parameters(model.config).total)
        OUT.print(f"{out}: the model after {step} steps, {size}")

    def _write_for_transformers(
        self, run: "Run", model: "OpenMythos", step: int, out: Path
    ) -> None:
        from openmythos.hub.export import Text, write
        from openmythos.hub.export_card import card
        from openmythos.train.config import TaskData

        data = run.config.data
        task = data.task if isinstance(data, TaskData) else None
        text = Text(tokenizer=run.text_tokenizer, task=task)
        write(model, out, text=text, card=card(run, model, step, licence=self.license))

    def _write_tasks(self, run: "Run", out: Path) -> None:
        from openmythos.eval import harness_tasks

        names = harness_tasks.write(run, out)
        OUT.print(f"{out}: {', '.join(names)}; all of them: {harness_tasks.TAG}")
        OUT.print(f"Next:  openmythos eval {self.folder} --tasks {out}")
