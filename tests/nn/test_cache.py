"""The cache: which loop writes which slot, what survives until decoding, and who moves `length`."""

from dataclasses import replace
from typing import Any, get_args

import pytest
import torch

from openmythos.config import ConfigError
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention, Block
from openmythos.nn.cache import (
    CachePolicy,
    ExactCache,
    FirstLoopCache,
    GroupedLoopCache,
    KVCache,
    LastLoopCache,
)
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.layout import TokenLayout, attention_context
from openmythos.nn.view import Cached, LayerView

POLICIES = [*(policy() for policy in get_args(CachePolicy)), GroupedLoopCache(group=3)]
WIDTH, BATCH, CAPACITY = 5, 2, 8


def name(policy: Any) -> str:
    return f"{policy.kind}{getattr(policy, 'group', '')}"


def make(**changes: Any) -> KVCache:
    fields = {
        "layers": (1, 2, 1),
        "kv_width": WIDTH,
        "batch": BATCH,
        "capacity": CAPACITY,
        "num_loops": 4,
        "prefill": ExactCache(),
        "decode": ExactCache(),
        "like": torch.empty(0),
    }
    return KVCache(**fields | changes)


def writes(policy: Any, loop: int) -> bool:
    """Whether a loop writes its slot: the first of the slot, or any, as the policy says."""
    return policy.overwrites or policy.slot(loop) not in map(policy.slot, range(loop))


def last_writer(policy: Any, slot: int, num_loops: int) -> int:
    return max(i for i in range(num_loops) if policy.slot(i) == slot and writes(policy, i))


def run_loops(cache: KVCache, seq: int, loops: int, mark: float = 0.0) -> None:
    """Write `mark + loop` as every number of `seq` tokens, as the recurrent layers would."""
    for loop in range(loops):
        for layer in range(cache.layers[1]):
            kv = torch.full((cache.batch, seq, WIDTH), mark + loop)
            cache.views("recurrent", seq, loop)[layer].update(lambda: kv)  # noqa: B023


@pytest.mark.parametrize("num_loops", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("policy", POLICIES, ids=name)
def test_slots_are_numbered_without_gaps_and_written_before_they_are_read(
    policy: CachePolicy, num_loops: int
) -> None:
    slots = [policy.slot(loop) for loop in range(num_loops)]
    assert slots == sorted(slots) and set(slots) == set(range(slots[-1] + 1))
    # What a loop reads has been written by then.
    for loop, slot in enumerate(slots):
        assert slot in {slots[earlier] for earlier in range(loop + 1) if writes(policy, earlier)}


def test_the_policies_are_what_their_names_say() -> None:
    loops = range(5)
    assert [ExactCache().slot(loop) for loop in loops] == [0, 1, 2, 3, 4]
    assert [LastLoopCache().slot(loop) for loop in loops] == [0] * 5
    assert all(writes(LastLoopCache(), loop) for loop in loops)
    assert [FirstLoopCache().slot(loop) for loop in loops] == [0] * 5
    assert [writes(FirstLoopCache(), loop) for loop in loops] == [True, *[False] * 4]
    assert [GroupedLoopCache(group=2).slot(loop) for loop in loops] == [0, 0, 1, 1, 2]
    assert [last_writer(GroupedLoopCache(group=2), slot, 5) for slot in range(3)] == [1, 3, 4]
    assert [GroupedLoopCache(group=1).slot(loop) for loop in loops] == [0, 1, 2, 3, 4]
    with pytest.raises(ConfigError, match="group = 0"):
        GroupedLoopCache(group=0)


@pytest.mark.parametrize("num_loops", [1, 4, 5])
@pytest.mark.parametrize("decode", POLICIES, ids=name)
@pytest.mark.parametrize("prefill", POLICIES, ids=name)
def test_begin_decode_keeps_what_decode_reads(
    prefill: CachePolicy, decode: CachePolicy, num_loops: int
) -> None:
    """Loop by loop, decoding sees the prompt as the last writer of its slot left it."""
    cache = make(prefill=prefill, decode=decode, num_loops=num_loops)
    run_loops(cache, 3, num_loops)
    cache.advance(3)
    held = {loop: cache.views("recurrent", 1, loop)[0].storage.clone() for loop in range(num_loops)}
    cache.begin_decode()
    for loop in range(num_loops):
        source = last_writer(decode, decode.slot(loop), num_loops)
        for layer in range(2):
            slot = cache.views("recurrent", 1, loop)[layer]
            assert slot.storage.equal(held[source])
            assert slot.start == 3 and slot.writes == writes(decode, loop)
    assert cache.length == 3
    before = [cache.views("recurrent", 1, loop)[0].storage.clone() for loop in range(num_loops)]
    cache.begin_decode()  # is done once
    after = [cache.views("recurrent", 1, loop)[0].storage for loop in range(num_loops)]
    assert all(a.equal(b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("policy", POLICIES, ids=name)
def test_begin_decode_copies_nothing_where_the_policy_stays(policy: CachePolicy) -> None:
    cache = make(prefill=policy, decode=policy)
    before = cache.views("recurrent", 1, 3)[0].storage.data_ptr()
    cache.begin_decode()
    assert cache.views("recurrent", 1, 3)[0].storage.data_ptr() == before


def test_exact_prefill_lets_decode_choose_a_loop() -> None:
    for decode, seen in (
        (ExactCache(), [0, 1, 2, 3, 4]),
        (LastLoopCache(), [4] * 5),
        (FirstLoopCache(), [0] * 5),
        (GroupedLoopCache(group=2), [1, 1, 3, 3, 4]),
    ):
        cache = make(decode=decode, num_loops=5)
        run_loops(cache, 3, 5)
        cache.advance(3)
        cache.begin_decode()
        read = [cache.views("recurrent", 1, loop)[1].storage[0, 0, 0].item() for loop in range(5)]
        assert read == seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decode", POLICIES, ids=name)
@pytest.mark.parametrize("prefill", POLICIES, ids=name)
def test_nbytes_is_the_formula(
    prefill: CachePolicy, decode: CachePolicy, dtype: torch.dtype
) -> None:
    layers = (2, 3, 1)
    cache = make(
        layers=layers,
        prefill=prefill,
        decode=decode,
        num_loops=5,
        like=torch.empty(0, dtype=dtype),
    )
    slot_bytes = BATCH * CAPACITY * WIDTH * dtype.itemsize

    def expected(policy: CachePolicy) -> int:
        return (layers[0] + layers[2] + layers[1] * (policy.slot(4) + 1)) * slot_bytes

    assert cache.nbytes == expected(prefill)
    cache.begin_decode()
    assert cache.nbytes == expected(decode)


def test_layers_and_loops_do_not_share_storage() -> None:
    cache = make()
    views = [cache.views("prelude", 2)[0], cache.views("coda", 2)[0]]
    views += [cache.views("recurrent", 2, loop)[layer] for layer in range(2) for loop in range(4)]
    for index, view in enumerate(views):
        view.update(lambda: torch.full((BATCH, 2, WIDTH), float(index)))  # noqa: B023
    for index, view in enumerate(views):
        assert view.storage[:, :2].eq(index).all()
        assert not view.storage[:, 2:].any()


def test_a_view_shows_all_columns_up_to_its_own() -> None:
    cache = make()
    first, second = torch.randn(BATCH, 3, WIDTH), torch.randn(BATCH, 2, WIDTH)
    assert cache.views("prelude", 3)[0].update(lambda: first).equal(first)
    cache.advance(3)
    view = cache.views("prelude", 2)[0]
    assert view.start == 3
    assert view.update(lambda: second).equal(torch.cat((first, second), dim=1))
    assert view.update(lambda: -second).equal(torch.cat((first, -second), dim=1))  # the next loop
    reading = replace(view, writes=False)
    assert reading.update(lambda: 1 / 0).equal(torch.cat((first, -second), dim=1))


def test_a_block_projects_only_where_the_view_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LatentAttention(num_heads=2, kv_latent_dim=WIDTH - 2, rope_head_dim=2)
    block = Block(16, config, SwiGLU(hidden_dim=8), 1e-6)
    storage, x = torch.randn(BATCH, CAPACITY, WIDTH), torch.randn(BATCH, 2, 16)
    layout = TokenLayout(2, 3, x.device)
    context = attention_context(layout, config, 16)
    with torch.no_grad():
        written, _ = block(x, LayerView(context, Cached(storage, 3, 2)))
        stored = block.attention.project_kv(block.attention_norm(x), context)
        assert storage[:, 3:5].equal(stored)
        monkeypatch.setattr(type(block.attention), "project_kv", None)
        reused, _ = block(x, LayerView(context, Cached(storage, 3, 2, writes=False)))
    assert reused.equal(written) and storage[:, 3:5].equal(stored)


def test_a_low_precision_cache_shows_what_it_stored() -> None:
    kv = torch.randn(BATCH, 2, WIDTH)
    cache = make(like=torch.empty(0, dtype=torch.bfloat16))
    visible = cache.views("prelude", 2)[0].update(lambda: kv)
    assert visible.dtype == torch.bfloat16 and visible.equal(kv.to(torch.bfloat16))


@pytest.mark.parametrize("loops_run", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("policy", POLICIES, ids=name)
def test_loops_that_were_not_run_hold_the_last_one_that_was(
    policy: CachePolicy, loops_run: int
) -> None:
    """For the current tokens alone; what older tokens left there stays."""
    cache = make(prefill=policy, decode=policy, num_loops=5)
    run_loops(cache, 3, 5, mark=10)
    cache.advance(3)
    slots = [cache.views("recurrent", 1, loop)[0].storage for loop in range(5)]
    older = [slot[:, :3].clone() for slot in slots]
    run_loops(cache, 2, loops_run, mark=20)
    ran = [slot[:, 3:5].clone() for slot in slots[:loops_run]]
    cache.end_loops(loops_run, torch.full((BATCH, 2), loops_run))
    for loop in range(5):
        for layer in range(2):
            storage = cache.views("recurrent", 1, loop)[layer].storage
            assert storage[:, :3].equal(older[loop])
            assert storage[:, 3:5].equal(ran[loop] if loop < loops_run else ran[-1])
            assert not storage[:, 5:].any()


def test_padding_is_remembered_per_column() -> None:
    cache = make()
    tokens = torch.zeros(BATCH, 2, dtype=torch.long)
    assert cache.valid.all() and not cache.padded
    assert cache.place(tokens, torch.ones(BATCH, 2, dtype=torch.bool)).valid is None
    cache.advance(2)
    assert not cache.padded
    layout = cache.place(tokens, torch.tensor([[True, True], [False, True]]))
    assert (layout.start, layout.seq) == (2, 2) and layout.valid is not None
    assert layout.valid.tolist() == [[True] * 4, [True, True, False, True]]
    cache.advance(2)
    assert cache.padded
    assert cache.valid.tolist() == [[True] * 8, [True, True, False, *[True] * 5]]
    assert cache.place(tokens, torch.ones(BATCH, 2, dtype=torch.bool)).valid is not None
    assert cache.padded  # still


def test_room_and_batch_are_checked() -> None:
    cache = make()
    cache.place(torch.zeros(BATCH, CAPACITY, dtype=torch.long), None)
    cache.advance(6)
    cache.place(torch.zeros(BATCH, 2, dtype=torch.long), None)
    with pytest.raises(ValueError, match=r"6 \+ 3 new tokens exceed its capacity of 8"):
        cache.place(torch.zeros(BATCH, 3, dtype=torch.long), None)
    with pytest.raises(ValueError, match="batch of 2, not of 3"):
        cache.place(torch.zeros(3, 1, dtype=torch.long), None)


# In the model


SIZES: dict[str, dict[str, Any]] = {"grouped_query": {"num_heads": 4, "num_kv_heads": 2}}


def model_with(attention: type = GroupedQueryAttention) -> OpenMythos:
    config = MythosConfig(
        dim=32,
        context=32,
        num_loops=3,
        attention=attention(**SIZES.get(attention().kind, {})),
        zero_init_outputs=False,
    )
    return OpenMythos(config, seed=0).eval()


@torch.no_grad()
@pytest.mark.parametrize("policy", POLICIES, ids=name)
def test_only_the_caller_advances(policy: CachePolicy) -> None:
    model = model_with()
    cache = model.new_cache(2, 12, prefill=policy, decode=policy)
    tokens = torch.randint(0, 257, (2, 4))
    first = model(tokens, cache=cache).logits
    assert cache.length == 0
    assert model(tokens, cache=cache).logits.equal(first)  # overwrites its own columns
    cache.end_loops(2, torch.full((2, 4), 2))
    cache.begin_decode()
    cache.place(tokens, torch.ones(2, 4, dtype=torch.bool))
    assert cache.length == 0
    cache.advance(4)
    assert cache.length == 4
    later = model(tokens, cache=cache).logits
    assert cache.length == 4 and not later.equal(first)


@torch.no_grad()
def test_the_model_refuses_what_does_not_fit() -> None:
    model = model_with()
    cache = model.new_cache(2, 4)
    with pytest.raises(ValueError, match="exceed its capacity of 4"):
        model(torch.zeros(2, 5, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="batch of 2, not of 1"):
        model(torch.zeros(1, 2, dtype=torch.long), cache=cache)
    with pytest.raises(ValueError, match="at most 3 loops"):
        model(torch.zeros(2, 2, dtype=torch.long), cache=cache, num_loops=4)
    assert cache.length == 0


@pytest.mark.parametrize("policy", POLICIES, ids=name)
@pytest.mark.parametrize("attention", get_args(Attention))
def test_a_models_cache_has_the_size_of_its_attention(attention: type, policy: Any) -> None:
    model = model_with(attention)
    cache = model.new_cache(3, 10, num_loops=5, prefill=policy, decode=policy)
    width = model.config.attention.kv_width(32)
    slots = 2 + policy.slot(4) + 1  # prelude, coda, and one recurrent layer
    assert cache.nbytes == slots * 3 * 10 * width * 4
    half = model.new_cache(3, 10, num_loops=5, prefill=policy, dtype=torch.bfloat16)
    assert half.nbytes == cache.nbytes // 2
