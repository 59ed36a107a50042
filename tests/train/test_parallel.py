"""Two gloo processes see what one process sees: router counts, loops, biases."""

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from variants import tiny_config

from openmythos.config import ConfigError
from openmythos.data.loader import Loader
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.loop_sampling import Granularity, PoissonLoops
from openmythos.train.config import TrainConfig
from openmythos.train.parallel import choose_device, rank_and_world_size, sum_over_ranks
from openmythos.train.trainer import Trainer

pytestmark = pytest.mark.distributed

SEQ, BATCH, RANKS = 32, 4, 2
GRANULARITIES = get_args(Granularity)


def first_step(shards: Path, per: Any) -> dict[str, Any]:
    """What a process hears of in its first step."""
    rank, world_size = rank_and_world_size()
    config = TrainConfig(
        num_steps=1, batch_size=BATCH, seq_len=SEQ, loops=PoissonLoops(max_loops=8, per=per)
    )
    loader = Loader(
        TokenShards.open(shards),
        seq_len=SEQ,
        batch_size=BATCH,
        seed=0,
        rank=rank,
        world_size=world_size,
    )
    model = OpenMythos(tiny_config(vocab_size=257, context=SEQ), seed=0)
    heard: dict[str, Any] = {}

    losses = model.losses

    def note_loops(*args: Any, **options: Any) -> Any:
        heard["loops"] = options["num_loops"]
        return losses(*args, **options)

    update = model.update_router_bias

    def note_counts(counts: dict[str, torch.Tensor]) -> None:
        heard["counts"] = {name: count.clone() for name, count in counts.items()}
        update(counts)

    model.losses = note_loops  # type: ignore[method-assign]
    model.update_router_bias = note_counts  # type: ignore[method-assign, assignment]
    metrics = Trainer(model, loader, config).run_step()
    heard["tokens"], heard["max_violation"] = metrics.tokens, metrics.max_violation
    heard["buffers"] = dict(model.named_buffers())
    heard["sum"] = sum_over_ranks(torch.tensor([1.0 + rank]))
    return heard


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    method = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=RANKS)
    try:
        for per in GRANULARITIES:
            torch.save(first_step(Path(folder) / "shards", per), Path(folder) / f"{per}-{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes have written what they heard."""
    path = tmp_path_factory.mktemp("ranks")
    documents = [Document(name=str(i), text=f"text number {i} " * 9) for i in range(20)]
    write_shards(documents, ByteTokenizer(), path / "shards")
    mp.spawn(worker, args=(str(path),), nprocs=RANKS)
    return path


@pytest.mark.parametrize("per", GRANULARITIES)
def test_two_ranks_hear_what_one_hears(folder: Path, per: Any) -> None:
    alone = first_step(folder / "shards", per)
    ranks = [torch.load(folder / f"{per}-{rank}.pt") for rank in range(RANKS)]
    for heard in ranks:
        assert heard["counts"].keys() == alone["counts"].keys()
        for name, counts in alone["counts"].items():
            assert torch.equal(heard["counts"][name], counts), name
        for name, buffer in alone["buffers"].items():
            assert torch.equal(heard["buffers"][name], buffer), name
        assert heard["tokens"] == alone["tokens"] == BATCH * SEQ
        assert float(heard["sum"]) == 3.0
    if per == "batch":
        assert [heard["loops"] for heard in ranks] == [alone["loops"]] * RANKS
    else:
        assert torch.equal(torch.cat([heard["loops"] for heard in ranks]), alone["loops"])


def test_one_process_is_rank_zero_of_one() -> None:
    assert rank_and_world_size() == (0, 1)
    x = torch.tensor([2.0])
    assert torch.equal(sum_over_ranks(x), torch.tensor([2.0]))


def test_device_is_chosen_by_name_or_by_what_there_is() -> None:
    assert choose_device("cpu").type == "cpu"
    accelerator = torch.accelerator.current_accelerator()
    assert choose_device("auto").type == (accelerator.type if accelerator else "cpu")


def test_batch_must_divide_among_the_ranks(tmp_path: Path) -> None:
    documents = [Document(name="one", text="some text " * 20)]
    shards = write_shards(documents, ByteTokenizer(), tmp_path)
    with pytest.raises(ConfigError, match="batch_size = 4: must divide by world_size = 3"):
        Loader(shards, seq_len=SEQ, batch_size=4, seed=0, world_size=3)
