"""One launch per number of processes, shared by all tests of several ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock


@pytest.fixture(scope="session")
def together(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Any:
    """See `ranks.Together`; the workers of pytest-xdist share its results."""
    import test_expert_parallel
    from ranks import all_work, launch, write_text

    base = tmp_path_factory.getbasetemp()
    base = base if worker_id == "master" else base.parent

    def found(ranks: int, part: str) -> tuple[Path, list[dict[str, Any]]]:
        folder = base / f"together-{ranks}"
        with FileLock(f"{folder}.lock"):
            if not (folder / "done").exists():
                folder.mkdir()  # a launch that failed is not repeated for every test
                write_text(folder)
                test_expert_parallel.go_alone(folder, ranks)
                launch(ranks, all_work, folder)
                (folder / "done").touch()
        each = [
            torch.load(folder / f"{ranks}-{rank}.pt", weights_only=False) for rank in range(ranks)
        ]
        return folder, [one[part] for one in each]

    return found
