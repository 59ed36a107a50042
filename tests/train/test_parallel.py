"""What a process knows of others, when there are none."""

from pathlib import Path

import pytest
import torch

from openmythos.config import ConfigError
from openmythos.data.loader import Loader
from openmythos.data.shards import write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.train.parallel import rank_and_world_size, sum_over_ranks


def test_one_process_is_rank_zero_of_one() -> None:
    assert rank_and_world_size() == (0, 1)
    x = torch.tensor([2.0])
    assert torch.equal(sum_over_ranks(x), torch.tensor([2.0]))


def test_batch_must_divide_among_the_ranks(tmp_path: Path) -> None:
    documents = [Document(name="one", text="some text " * 20)]
    shards = write_shards(documents, ByteTokenizer(), tmp_path)
    with pytest.raises(ConfigError, match="batch_size = 4: must divide by world_size = 3"):
        Loader(shards, seq_len=32, batch_size=4, seed=0, world_size=3)
