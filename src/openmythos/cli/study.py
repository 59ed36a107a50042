"""The command that runs a study."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich import box
from rich.table import Table

from openmythos.cli.flags import Changes, Device, flat, shown
from openmythos.cli.progress import Progress
from openmythos.cli.screen import OUT
from openmythos.config import ConfigError, require, require_int


@dataclass(frozen=True)
class Study:
    """Test a claim of the field: train its arms with several seeds, write results and verdict."""

    name: tyro.conf.Positional[Annotated[str, shown("STUDY", "")]] = ""
    """Study; see --list."""
    list: bool = False
    """List the studies and their claims."""
    seeds: int = 5
    """Seeds per arm."""
    quick: bool = False
    """Seconds instead of minutes: shows that the study runs; the verdict means nothing."""
    out: Annotated[str, shown("FOLDER")] = "results"
    """Parent of the study's folder. Runs found there are kept, not repeated."""
    processes: int = 2
    """Runs at the same time, each on one thread; they share the device."""
    device: Device = "auto"
    report_only: bool = False
    """Train nothing: judge the runs in --out and write report and figure again."""
    set: Changes = ()
    """Changes to every arm, such as train.num_steps=3200."""

    def run(self) -> None:
        # Imported here: torch takes seconds, and flags are parsed without it.

        from openmythos.studies import runner

        if self.list:
            for name, study in runner.STUDIES.items():
                OUT.print(f"{name}: {study.claim}")
            return
        if not self.name:
            raise ConfigError(f"study: needs a name; known: {', '.join(runner.STUDIES)}")
        study = runner.get(self.name)
        require_int("seeds", self.seeds, minimum=1)
        require_int("processes", self.processes, minimum=1)
        folder = Path(self.out) / (f"{study.name}-quick" if self.quick else study.name)
        if self.report_only:
            allowed = "cannot be combined with --quick or --set"
            require(not (self.quick or self.set), "report_only", True, allowed)
            finding = runner.judge_kept(study, folder)
        else:
            with Progress(OUT, study.name, unit="runs") as progress:
                finding = runner.run_study(
                    study,
                    folder,
                    seeds=1 if self.quick else self.seeds,
                    quick=self.quick,
                    overrides=flat(self.set),
                    processes=self.processes,
                    device=self.device,
                    on_progress=lambda done, total, last: progress.update(done, last, total=total),
                )
        table = Table(*finding.table[0], box=box.SIMPLE_HEAD)
        for row in finding.table:
            table.add_row(*row.values())
        OUT.print(table)
        OUT.print(f"{study.claim}\n{finding.verdict}: {finding.sentence}")
        if self.quick:
            OUT.print("A quick run shows that the study runs; its verdict means nothing.")
        OUT.print(f"\nWritten: {folder}/results.json, report.md, figure.png")
