"""The commands that prepare text for training: `tokenizer`, `data prepare`, `data check`."""

# Each `run` imports what it needs: torch takes seconds, and flags are parsed without it.

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from openmythos.cli.flags import Texts, flat, require_folder, shown
from openmythos.cli.progress import Progress, counted
from openmythos.cli.screen import OUT
from openmythos.config import ConfigError, require_int, require_number
from openmythos.files import load_json

if TYPE_CHECKING:
    from openmythos.data.prepare import Progress as Done
    from openmythos.data.prepared import Prepared


@dataclass(frozen=True)
class Tokenizer:
    """Train a byte-level BPE tokenizer and write tokenizer.json (Hugging Face format)."""

    data: Texts = ()
    """Text to train on, as for `openmythos train --data`; stdlib is the default."""
    vocab_size: int = 4096
    """Number of tokens."""
    out: Annotated[str, shown("FOLDER")] = "tokenizer"
    """Folder for tokenizer.json; use it with --set tokenizer.kind=file tokenizer.path=FOLDER."""

    def run(self) -> None:
        from openmythos.data.tokenizer import BPE
        from openmythos.train.config import TextData
        from openmythos.train.run import open_data

        folder, wanted = Path(self.out), BPE(vocab_size=self.vocab_size)
        require_folder("out", self.out)
        if (folder / "tokenizer.json").exists():
            raise ConfigError(f"{folder}/tokenizer.json: exists already; choose another --out")
        corpus = open_data(TextData(paths=flat(self.data) or ("stdlib",)))
        with Progress(OUT, "reading the corpus", unit="MB") as progress:
            texts = counted((document.text for document in corpus.train()), progress)
            tokenizer = wanted.build(texts)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(folder)
        held_out = [document.text for document in corpus.held_out()]
        tokens = sum(map(len, tokenizer.encode_batch(held_out)))
        size = sum(len(text.encode()) for text in held_out)
        OUT.print(
            f"{folder}/tokenizer.json: {tokenizer.vocab_size} tokens, "
            f"{size / tokens:.2f} bytes per token on held-out text"
        )


@dataclass(frozen=True)
class Prepare:
    """Tokenise a corpus once, with many processes, for `openmythos train --data FOLDER`.

    After an interruption the same command goes on.
    """

    data: Texts
    """Text to read, as for `openmythos train --data`."""
    tokenizer: Annotated[str, shown("PATH")]
    """A tokenizer.json or its folder (see `openmythos tokenizer`), or bytes."""
    out: Annotated[str, shown("FOLDER")]
    """Folder to create, or to go on with."""
    field: Annotated[str, shown("NAME")] = "text"
    """Field (.jsonl) or column (.parquet) that holds the text."""
    held_out: float = 0.04
    """Share of the documents held out from training."""
    limit_mb: float = 0.0
    """Read at most this many megabytes of text (0: all)."""
    processes: int = 0
    """Processes that tokenise (0: one per core)."""
    part_mb: float = 16.0
    """Megabytes of text in each unit of work."""
    skip_bad_rows: bool = False
    """Skip and count rows that have no text; otherwise they are errors."""

    def run(self) -> None:
        from openmythos.data.prepare import prepare
        from openmythos.data.prepared import Preparation
        from openmythos.data.tokenizer import ByteTokenizer, load_tokenizer

        require_number("limit_mb", self.limit_mb, at_least=0, at_most=1e12)
        require_number("part_mb", self.part_mb, at_least=1e-6, at_most=1e6)
        require_int("processes", self.processes, minimum=0)
        wanted = Preparation(
            paths=flat(self.data),
            field=self.field,
            held_out=self.held_out,
            limit_bytes=round(self.limit_mb * 1e6),
            part_bytes=round(self.part_mb * 1e6),
            skip_bad_rows=self.skip_bad_rows,
        )
        is_bytes = self.tokenizer == "bytes"
        tokenizer = ByteTokenizer() if is_bytes else load_tokenizer(self.tokenizer)
        processes = self.processes or os.cpu_count() or 1
        out = Path(self.out)
        try:
            with Progress(OUT, "preparing", unit="MB") as progress:
                started = time.perf_counter()

                def report(now: "Done") -> None:
                    rate = now.text / (time.perf_counter() - started)
                    text = f"{rate / 1e6:.2f} MB/s"
                    progress.update(now.done, text, total=now.total or None, kept=now.kept)

                prepared = prepare(wanted, tokenizer, out, processes=processes, on_progress=report)
        except KeyboardInterrupt:
            OUT.print(f"{out}: finished parts are kept; the same command goes on")
            raise
        _print(out, prepared)


@dataclass(frozen=True)
class Check:
    """Compare every file of a prepared folder with its checksum."""

    folder: tyro.conf.Positional[Annotated[str, shown("FOLDER")]]
    """Folder made by `openmythos data prepare`."""

    def run(self) -> None:
        from openmythos.data import prepared

        folder = Path(self.folder)
        if not prepared.is_prepared(folder):
            missing = prepared.PREPARED_FILE
            raise ConfigError(f"{folder}: is not a prepared folder: it has no {missing}")
        with Progress(OUT, "reading", total=len(prepared.SIDES), unit="parts") as progress:
            for number, side in enumerate(prepared.SIDES, start=1):
                prepared.open_prepared(folder, side, verify=True)
                progress.update(number)
        _print(folder, load_json(prepared.Prepared, folder / prepared.PREPARED_FILE))


@dataclass(frozen=True)
class Data:
    """Turn text into tokens that any number of runs can train on."""

    command: Prepare | Check

    def run(self) -> None:
        self.command.run()


def _print(folder: Path, prepared: "Prepared") -> None:
    from openmythos.data.prepared import SIDES

    tokens, held_out = (sum(getattr(part, side) for part in prepared.parts) for side in SIDES)
    size = sum(part.num_bytes for part in prepared.parts)
    OUT.print(
        f"{folder}: {tokens:,} training and {held_out:,} held-out tokens of {size / 1e6:,.1f} MB, "
        f"{size / (tokens + held_out):.2f} bytes per token"
    )
    skipped = sum(part.skipped for part in prepared.parts)
    if skipped:
        OUT.print(f"skipped {skipped} files that are not UTF-8 text")
