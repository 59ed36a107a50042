"""Any stretch of samples has the shares asked for, and each source is read in its own order."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from openmythos.config import ConfigError
from openmythos.data.loader import Loader
from openmythos.data.mixture import Mixture
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import BPETokenizer, ByteTokenizer

WEIGHTS = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**40)
SEQ = 8


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[TokenShards]:
    """Three streams of different lengths, each with letters of its own."""
    folder = tmp_path_factory.mktemp("sources")
    made = []
    for number, (letters, count) in enumerate([("abc", 30), ("defgh", 12), ("xyz", 50)]):
        texts = [letters[n % len(letters)] * (3 + n % 9) for n in range(count)]
        documents = [Document(name=str(n), text=text) for n, text in enumerate(texts)]
        made.append(write_shards(documents, ByteTokenizer(), folder / str(number)))
    return made


def loader(sources: list[TokenShards], **options: Any) -> Loader:
    return Loader(sources, **{"seq_len": SEQ, "batch_size": 6, "seed": 0} | options)


@given(weights=WEIGHTS, seed=SEEDS, start=st.integers(0, 10**12), length=st.integers(0, 400))
def test_any_stretch_has_the_shares(
    weights: list[float], seed: int, start: int, length: int
) -> None:
    mixture = Mixture(weights, seed)
    places = [mixture.place(sample) for sample in range(start, start + length)]
    for number, weight in enumerate(weights):
        own = [earlier for source, earlier in places if source == number]
        assert own == list(range(own[0], own[0] + len(own))) if own else True
        assert not own or abs(own[0] - start * weight / sum(weights)) < len(weights) + 1e-6
        assert abs(len(own) - length * weight / sum(weights)) < len(weights) + 1e-6


def test_seeds_take_turns_differently() -> None:
    orders = {tuple(Mixture([3, 2, 1], seed).place(s)[0] for s in range(60)) for seed in range(6)}
    assert len(orders) > 3


@given(weights=st.lists(st.floats(0.1, 10), min_size=3, max_size=3), seed=SEEDS)
def test_every_window_of_a_source_is_read_once_per_epoch(
    sources: list[TokenShards], weights: list[float], seed: int
) -> None:
    made = loader(sources, weights=weights, seed=seed, batch_size=1)
    starts: list[list[int]] = [[], [], []]
    for sample in range(400):
        number, earlier = made._mixture.place(sample)
        assert earlier == len(starts[number])
        starts[number].append(made._sources[number].start(earlier))
    for number, windows in enumerate(made.windows_per_epoch):
        alone = loader([sources[number]], batch_size=1, seed=seed)
        assert number or starts[0] == [alone._sources[0].start(n) for n in range(len(starts[0]))]
        for first in range(0, len(starts[number]) - windows + 1, windows):
            epoch = sorted(starts[number][first : first + windows])
            assert epoch == [epoch[0] + SEQ * n for n in range(windows)]
            assert epoch[-1] + SEQ < len(sources[number])


@given(seed=SEEDS, step=st.integers(0, 10**9), world_size=st.sampled_from([1, 2, 3, 6]))
def test_ranks_together_read_what_one_would_after_whatever_steps(
    sources: list[TokenShards], seed: int, step: int, world_size: int
) -> None:
    options: dict[str, Any] = {"weights": (0.5, 0.2, 0.3), "seed": seed}
    whole = loader(sources, **options)
    whole.batch(step // 2)
    wanted = whole.batch(step)
    parts = [
        loader(sources, rank=rank, world_size=world_size, **options).batch(step)
        for rank in range(world_size)
    ]
    for name in ("tokens", "targets", "documents"):
        assert torch.equal(torch.cat([getattr(p, name) for p in parts]), getattr(wanted, name))


def test_a_window_is_of_one_source_and_documents_rise_at_bos(sources: list[TokenShards]) -> None:
    made = loader(sources, weights=(1.0, 1.0, 2.0), batch_size=4)
    alphabets = [set(range(*span)) for span in ((97, 100), (100, 105), (120, 123))]
    seen = [0, 0, 0]
    for step in range(30):
        batch = made.batch(step)
        is_bos = batch.tokens[:, 1:] == ByteTokenizer.bos_id
        assert torch.equal(batch.documents.diff(dim=1), is_bos.long())
        for row in batch.tokens:
            (source,) = (n for n, known in enumerate(alphabets) if known & set(row.tolist()))
            seen[source] += 1
    assert seen == pytest.approx([30, 30, 60], abs=3)


def test_no_weights_are_those_of_the_sizes(sources: list[TokenShards]) -> None:
    made = loader(sources)
    drawn = Counter(made._mixture.place(sample)[0] for sample in range(10_000))
    shares = [drawn[n] / size for n, size in enumerate(made.windows_per_epoch)]
    assert max(shares) == pytest.approx(min(shares), rel=0.01)


def test_one_source_is_a_loader_of_it(sources: list[TokenShards]) -> None:
    one, several = (
        loader(sources[:1], weights=(7.0,)),
        Loader(sources[0], seq_len=SEQ, batch_size=6, seed=0),
    )
    for step in range(20):
        assert torch.equal(one.batch(step).tokens, several.batch(step).tokens)


def test_wrong_mixtures_are_named(tmp_path: Path, sources: list[TokenShards]) -> None:
    with pytest.raises(ConfigError, match=r"weights = \[0.5, 0.5\]: must be 3, one for each"):
        loader(sources, weights=(0.5, 0.5))
    with pytest.raises(ConfigError, match=r"weights = 0\.0: must be a number, above 0"):
        loader(sources, weights=(0.5, 0.0, 0.5))
    bpe = BPETokenizer.train(["abc" * 20], 270)
    other = write_shards([Document(name="a", text="abc" * 90)], bpe, tmp_path)
    with pytest.raises(ConfigError, match="different tokenizers"):
        loader([*sources, other])
    with pytest.raises(ConfigError, match="different tokenizers"):
        TokenShards.join([sources[0], other])


def test_joined_streams_follow_one_another(sources: list[TokenShards]) -> None:
    joined = TokenShards.join(sources)
    tokens = [token for each in sources for token in each.read(0, len(each)).tolist()]
    assert joined.read(0, len(joined)).tolist() == tokens
    starts = [n for n, token in enumerate(tokens) if token == joined.bos_id]
    assert joined.document_starts.tolist() == starts
    assert joined.index.num_documents == len(starts)
    assert joined.num_bytes == sum(each.num_bytes for each in sources)
