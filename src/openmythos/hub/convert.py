"""Write a model that was opened in another form, with its tokenizer and licence.

Forms: this package's own folder, an export for transformers, and every public format that `load`
can write.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from openmythos.config import ConfigError, require, unknown_name
from openmythos.data.tokenizer import TOKENIZER_FILE, Tokenizer
from openmythos.files import replacing, write_json
from openmythos.hub import export
from openmythos.hub.load import Source, save, written_names
from openmythos.hub.own import OWN
from openmythos.hub.tokenizer import COPIED, PublicTokenizer
from openmythos.model.mythos import OpenMythos
from openmythos.train.config import TaskData

NATIVE, TRANSFORMERS = "native", "hf"


def forms() -> tuple[str, ...]:
    """The names of all forms."""
    return (NATIVE, TRANSFORMERS, *(name for name in written_names() if name != OWN.name))


def write(
    source: Source, model: OpenMythos, out: Path, *, form: str = NATIVE, card: str = ""
) -> None:
    """Write a source's model to the folder `out`, which appears when it is complete.

    `card`: the model card of an export for transformers. A form that cannot represent the model, or
    a folder that exists, raises a ConfigError.
    """
    require(form in forms(), "form", form, unknown_name("choice", form, forms(), as_listed=True))
    require(not out.exists(), "out", str(out), "exists already")
    tokenizer = _tokenizer(source)
    if form == NATIVE:
        with export.new_folder(out) as folder:
            model.save_pretrained(folder)
            _Beside.of(source, tokenizer).write(folder)
            if not isinstance(tokenizer, PublicTokenizer | None):
                tokenizer.save(folder)
        return
    beside = _Beside.of(source, tokenizer)
    if not isinstance(tokenizer, PublicTokenizer):
        beside.made |= _text(source, tokenizer).files(model.config.context)
    if form == TRANSFORMERS:
        export.write(model, out, card=card, add=beside.write)
        return
    with export.new_folder(out) as folder:
        save(model, folder, form)
        beside.write(folder)


@dataclass
class _Beside:
    """The files beside config and weights: those of the source, and those that are made."""

    copied: dict[str, Path]
    made: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, source: Source, tokenizer: Tokenizer | None) -> "_Beside":
        """What a source has; what a public tokenizer lacks as files is made."""
        if source.run is not None:
            return cls({})
        folders = (source.path / "tokenizer", source.path)
        found = (path for folder in folders for name in COPIED for path in folder.glob(name))
        beside = cls({path.name: path for path in found})
        if isinstance(tokenizer, PublicTokenizer):
            beside.made |= tokenizer.files()
        elif tokenizer is not None:
            beside.copied.pop(TOKENIZER_FILE, None)  # written in the form that is asked for
        return beside

    def write(self, folder: Path) -> None:
        for name, data in self.made.items():
            if name not in self.copied:
                write_json(data, folder / name)
        for name, path in self.copied.items():
            with replacing(folder / name) as temporary:
                shutil.copyfile(path, temporary)


def _tokenizer(source: Source) -> Tokenizer | None:
    """The source's tokenizer; None if there is none that this package can use."""
    try:
        return source.tokenizer
    except ConfigError:
        return None


def _text(source: Source, tokenizer: Tokenizer | None) -> export.Text:
    data = None if source.run is None else source.run.config.data
    return export.Text(tokenizer=tokenizer, task=data.task if isinstance(data, TaskData) else None)
