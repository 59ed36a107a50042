"""The command that writes a model for other programs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from openmythos.cli.flags import Device, ModelSource, Step, shown
from openmythos.cli.screen import OUT, short
from openmythos.config import ConfigError, require, unknown_name

if TYPE_CHECKING:
    from openmythos.hub.load import Source
    from openmythos.model.mythos import OpenMythos

LM_EVAL = "lm-eval"


@dataclass(frozen=True)
class Export:
    """Write a model to a folder in another format, or a run's evaluation as tasks of lm-eval."""

    source: ModelSource
    out: Annotated[str, shown("FOLDER")]
    """Folder to create: config.json, model.safetensors, tokenizer.json (for text)."""
    format: Annotated[str, shown("native|hf|lm-eval|huginn|ouro|...")] = "native"
    """native: for `OpenMythos.from_pretrained`; hf: for transformers; lm-eval: tasks, no model;
    else a public format that can hold the model (docs/models.md)."""
    license: Annotated[str, shown("NAME", "the source's, else unknown")] = ""
    """Licence of the weights, for the model card."""
    step: Step = None
    device: Device = "cpu"

    def run(self) -> None:
        from openmythos.hub import convert
        from openmythos.hub.load import open_source
        from openmythos.planning import cost

        known = (*convert.forms(), LM_EVAL)
        allowed = unknown_name("choice", self.format, known, as_listed=True)
        require(self.format in known, "format", self.format, allowed)
        source, out = open_source(self.source), Path(self.out)
        require(not out.exists(), "out", self.out, "exists already")
        if self.format == LM_EVAL:
            self._write_tasks(source, out)
            return
        model, step = self._load(source)
        card = self._card(source, model, step) if self.format == convert.TRANSFORMERS else ""
        convert.write(source, model, out, form=self.format, card=card)
        after = source.format.family if step is None else f"the model after {step} steps"
        OUT.print(f"{out}: {after}, {short(cost.parameters(model.config).total)}")

    def _load(self, source: "Source") -> tuple["OpenMythos", int | None]:
        """The model, and its number of steps if it is of a run."""
        if source.run is None:
            return source.load(self.device, step=self.step), None
        return source.run.load_checkpoint(self.device, step=self.step)

    def _card(self, source: "Source", model: "OpenMythos", step: int | None) -> str:
        from openmythos.hub.export_card import card, converted_card
        from openmythos.hub.info import licence

        named = self.license or licence(source) or "unknown"
        if source.run is None or step is None:
            return converted_card(source, model, licence=named)
        return card(source.run, model, step, licence=named)

    def _write_tasks(self, source: "Source", out: Path) -> None:
        from openmythos.eval import harness_tasks

        if source.run is None:
            raise ConfigError(f"format = {LM_EVAL!r}: {source.path} is not a run, it has no tasks")
        names = harness_tasks.write(source.run, out)
        OUT.print(f"{out}: {', '.join(names)}; all of them: {harness_tasks.TAG}")
        OUT.print(f"Next:  openmythos eval {self.source} --tasks {out}")
