"""Functions of distributed.ranks in one process, and in two if the first fails."""

from pathlib import Path

import pytest
import torch
from ranks import launch

from openmythos.config import ConfigError
from openmythos.data.loader import Loader
from openmythos.data.shards import write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.distributed import ranks as parallel
from openmythos.distributed.ranks import (
    first_rank_does,
    rank_and_world_size,
    sum_over_ranks,
    wait_for_file,
)


def test_one_process_is_rank_zero_of_one() -> None:
    assert rank_and_world_size() == (0, 1)
    x = torch.tensor([2.0])
    assert torch.equal(sum_over_ranks(x), torch.tensor([2.0]))


def test_batch_must_divide_among_the_ranks(tmp_path: Path) -> None:
    documents = [Document(name="one", text="some text " * 20)]
    shards = write_shards(documents, ByteTokenizer(), tmp_path)
    with pytest.raises(ConfigError, match="batch_size = 4: must divide by world_size = 3"):
        Loader(shards, seq_len=32, batch_size=4, seed=0, world_size=3)


def _make(folder: Path) -> list[str]:
    """Results of `first_rank_does` on this rank, for work that succeeds and work that fails."""
    found = [str(first_rank_does(lambda: folder.name))]
    try:
        first_rank_does(lambda: (folder / "made").read_text())
    except OSError as error:
        found.append(type(error).__name__)
    except ConfigError as error:
        found.append(str(error))
    return found


@pytest.mark.distributed
def test_all_ranks_fail_with_the_first(tmp_path: Path) -> None:
    first, second = launch(2, _make, tmp_path)
    assert first == [tmp_path.name, "FileNotFoundError"]
    assert second[0] == "None"
    assert second[1].startswith("rank 0 failed: [Errno 2] No such file")


def test_waiting_for_a_file_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "TIMEOUT", parallel.TIMEOUT * 0)
    with pytest.raises(
        ConfigError, match=r"config.toml: not visible to rank 0 .* share the folder"
    ):
        wait_for_file(tmp_path / "config.toml")
    (tmp_path / "config.toml").write_text("")
    wait_for_file(tmp_path / "config.toml")
