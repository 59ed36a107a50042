"""The order of the data is a pure function of (seed, step, rank), and nothing is read twice."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openmythos.config import ConfigError
from openmythos.data.loader import Batch, Loader, evaluation_windows
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import ByteTokenizer

BOS = ByteTokenizer.bos_id


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    """A few hundred tokens in 40 documents; a position is recognised by its character."""
    texts = ["".join(chr(32 + (7 * n + i) % 90) for i in range(1 + n % 17)) for n in range(40)]
    documents = (Document(name=str(n), text=text) for n, text in enumerate(texts))
    return write_shards(documents, ByteTokenizer(), tmp_path_factory.mktemp("s"), shard_tokens=50)


def of_length(folder: Path, length: int) -> TokenShards:
    """Shards of one document of length - 1 different characters and bos."""
    text = "".join(chr(32 + number) for number in range(length - 1))
    return write_shards([Document(name="a", text=text)], ByteTokenizer(), folder)


def loader(shards: TokenShards, **options: Any) -> Loader:
    return Loader(shards, **{"seq_len": 8, "batch_size": 4, "seed": 0} | options)


def equal(a: Batch, b: Batch) -> bool:
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for name in ("tokens", "targets", "documents")
    )


def starts(loader: Loader, step: int) -> list[int]:
    """Where the windows of a step start, by the loader's own arithmetic."""
    (source,) = loader._sources
    return [source.start(step * loader._batch_size + row) for row in loader._rows]


def test_shapes_and_dtypes(shards: TokenShards) -> None:
    batch = loader(shards).batch(0)
    for tensor in (batch.tokens, batch.targets, batch.documents):
        assert tensor.shape == (4, 8)
        assert tensor.dtype == torch.int64


@pytest.mark.parametrize("batch_size", [1, 4])
def test_targets_are_the_next_tokens(shards: TokenShards, batch_size: int) -> None:
    made = loader(shards, batch_size=batch_size)
    whole = torch.from_numpy(shards.read(0, len(shards)))
    for step in range(5):
        batch = made.batch(step)
        for row, start in enumerate(starts(made, step)):
            assert torch.equal(batch.tokens[row], whole[start : start + 8])
            assert torch.equal(batch.targets[row], whole[start + 1 : start + 9])
        batch.tokens.zero_()
        assert torch.equal(batch.targets[0, -1:], whole[starts(made, step)[0] + 8 :][:1])
        assert batch.targets.any()


def test_documents_rise_exactly_at_bos(shards: TokenShards) -> None:
    seen = 0
    for step in range(20):
        batch = loader(shards).batch(step)
        is_bos = batch.tokens[:, 1:] == BOS
        assert torch.equal(batch.documents.diff(dim=1), is_bos.long())
        assert not batch.documents[:, 0].any()
        seen += int(is_bos.sum())
    assert seen > 0


@given(step=st.integers(0, 10**9), other=st.integers(0, 10**9), seed=st.integers(0, 2**40))
def test_a_batch_depends_on_seed_and_step_alone(
    shards: TokenShards, step: int, other: int, seed: int
) -> None:
    used = loader(shards, seed=seed)
    used.batch(other)
    assert equal(used.batch(step), loader(shards, seed=seed).batch(step))


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
def test_ranks_share_the_batch_of_one(shards: TokenShards, world_size: int) -> None:
    for step in range(12):
        whole = loader(shards, batch_size=6).batch(step)
        parts = [
            loader(shards, batch_size=6, rank=rank, world_size=world_size).batch(step)
            for rank in range(world_size)
        ]
        joined = Batch(
            *(
                torch.cat([getattr(part, name) for part in parts])
                for name in ("tokens", "targets", "documents")
            )
        )
        assert equal(joined, whole)


@pytest.mark.parametrize("seq_len", [1, 5, 8, 50])
def test_an_epoch_reads_every_window_once(shards: TokenShards, seq_len: int) -> None:
    made = loader(shards, seq_len=seq_len, batch_size=1)
    (windows,) = made.windows_per_epoch
    assert windows * seq_len > len(shards) - 2 * seq_len
    offsets = set()
    orders = set()
    for epoch in range(4):
        order = [starts(made, epoch * windows + number)[0] for number in range(windows)]
        first = min(order)
        assert 0 <= first < 2 * seq_len
        assert sorted(order) == [first + seq_len * number for number in range(windows)]
        assert max(order) + seq_len < len(shards)
        offsets.add(first)
        orders.add(tuple(start - first for start in order))
    assert len(orders) == 4
    assert len(offsets) > 1 or seq_len == 1


def test_seeds_differ(shards: TokenShards) -> None:
    batches = [loader(shards, seed=seed, batch_size=8).batch(0) for seed in range(5)]
    assert not any(equal(batches[0], other) for other in batches[1:])


def test_every_token_is_a_target_over_the_epochs(tmp_path: Path) -> None:
    made = loader(of_length(tmp_path, 22), seq_len=8, batch_size=1)
    seen = {start + i for step in range(200) for start in starts(made, step) for i in range(1, 9)}
    assert seen == set(range(1, 22))


@pytest.mark.parametrize("length", [9, 10, 16, 17, 18])
def test_a_corpus_smaller_than_a_batch_is_read_again(tmp_path: Path, length: int) -> None:
    made = loader(of_length(tmp_path, length), seq_len=8, batch_size=32)
    assert made.windows_per_epoch[0] * 8 <= length - 1
    batch = made.batch(3)
    assert batch.tokens.shape == (32, 8)
    assert equal(batch, made.batch(3))


def test_a_corpus_shorter_than_a_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the corpus has 8 tokens, seq_len = 8 needs 9"):
        loader(of_length(tmp_path, 8))


def test_ranks_must_divide_the_batch(shards: TokenShards) -> None:
    with pytest.raises(ConfigError, match="batch_size = 4: must divide by world_size = 3"):
        loader(shards, batch_size=4, world_size=3)


@given(data=st.data())
def test_evaluation_counts_every_token_but_the_first_once(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    length = data.draw(st.integers(2, 60))
    seq_len = data.draw(st.integers(1, 20))
    batch_size = data.draw(st.integers(1, 5))
    shards = of_length(tmp_path_factory.mktemp("text"), length)
    counted: list[int] = []
    for batch in evaluation_windows(shards, seq_len, batch_size=batch_size):
        assert batch.tokens.shape == batch.targets.shape == batch.weights.shape
        assert batch.tokens.shape[0] <= batch_size
        assert batch.tokens.shape[1] == seq_len
        counts = batch.weights == 1
        assert torch.equal(batch.weights, counts.float())
        counted += batch.targets[counts].tolist()
    assert counted == list(range(32, 31 + length))


def test_evaluation_knows_the_documents(shards: TokenShards) -> None:
    for batch in evaluation_windows(shards, 8):
        is_bos = batch.tokens[:, 1:] == BOS
        assert torch.equal(batch.documents.diff(dim=1), is_bos.long())


def test_a_text_without_a_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the held-out text has 1 tokens, evaluation needs 2"):
        next(evaluation_windows(of_length(tmp_path, 1), 8))
