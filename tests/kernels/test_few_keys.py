"""The native attention with few keys equals its reference, for any size, mask and layout."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from openmythos.kernels import elementwise, few_keys, native
from openmythos.kernels.attention import attention, reference

pytestmark = pytest.mark.skipif(native.library("few_keys") is None, reason="no C++ compiler")
SCALE = 0.3
MASKS = ("none", "causal", "window", "padded", "anywhere", "one for all queries")


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def masked(kind: str, batch: int, seq: int, total: int) -> Tensor:
    """[batch or 1, 1, seq or 1, total]; every query sees a key."""
    seen = torch.ones(seq, total, dtype=torch.bool).tril(total - seq)[None, None]
    if kind == "window":
        return seen & torch.ones(seq, total, dtype=torch.bool).triu(total - seq - 2)
    if kind == "padded":
        valid = torch.arange(total) >= torch.arange(batch)[:, None, None, None] % total
        return (seen & valid) | torch.eye(total, dtype=torch.bool)[total - seq :]
    if kind == "one for all queries":
        return torch.arange(total) >= torch.arange(batch)[:, None, None, None] % total
    if kind == "anywhere":
        return ((torch.arange(seq)[:, None] + torch.arange(total)) % 3 < 2)[None, None]
    return seen


@settings(max_examples=40)
@given(
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 3),
    seq=st.sampled_from([2, 3, 8, 9, 17, 42]),
    earlier=st.sampled_from([0, 1, 15, 30]),
    width=st.sampled_from([4, 16, 24, 37]),
    value_width=st.sampled_from([3, 16, 32]),
    kind=st.sampled_from(MASKS),
    together=st.booleans(),
)
def test_it_equals_the_reference(
    batch: int,
    kv_heads: int,
    group: int,
    seq: int,
    earlier: int,
    width: int,
    value_width: int,
    kind: str,
    together: bool,
) -> None:
    total = seq + earlier
    query = drawn(batch, seq, kv_heads * group, width).transpose(1, 2)
    if together:  # as layers have it: keys and values in one tensor, heads beside width
        both = drawn(batch, total, kv_heads * (width + value_width))
        key, value = both.split((kv_heads * width, kv_heads * value_width), dim=-1)
        key, value = (x.unflatten(-1, (kv_heads, -1)).transpose(1, 2) for x in (key, value))
    else:
        key, value = (drawn(batch, kv_heads, total, w) for w in (width, value_width))
    mask = None if kind == "none" else masked(kind, batch, seq, total)
    packed = kind not in ("causal", "window", "padded")  # else no query sees a later key
    narrow = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (query, key)]
    narrow.append(value.detach().requires_grad_())
    wide = [x.detach().double().requires_grad_() for x in narrow]
    assert few_keys.accepts(*narrow)
    found = attention(*narrow, mask=mask, packed=packed, scale=SCALE)
    wanted = reference(*wide, mask=mask, is_causal=False, scale=SCALE)
    grad = drawn(*found.shape)
    close = {"rtol": 2e-5, "atol": 2e-5, "check_dtype": False}
    torch.testing.assert_close(found, wanted, **close)
    gradients = torch.autograd.grad(found, narrow, grad)
    for one, other in zip(gradients, torch.autograd.grad(wanted, wide, grad.double()), strict=True):
        torch.testing.assert_close(one, other, **close)
    with torch.no_grad():
        assert attention(*narrow, mask=mask, packed=packed, scale=SCALE).equal(found)


@pytest.mark.parametrize("seq", [2, 31, 130])
def test_without_a_mask_it_may_be_causal(seq: int) -> None:
    inputs = [drawn(2, 3, seq, 8) for _ in range(3)]
    wanted = reference(*(x.double() for x in inputs), mask=None, is_causal=True, scale=SCALE)
    assert few_keys.accepts(*inputs)
    found = attention(*inputs, is_causal=True, scale=SCALE)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_row_alone_has_the_same_bits_as_in_a_batch() -> None:
    inputs = [drawn(5, 2, 21, 16) for _ in range(3)]
    together = attention(*inputs, is_causal=True, scale=SCALE)
    alone = [attention(*(x[[n]] for x in inputs), is_causal=True, scale=SCALE) for n in range(5)]
    assert torch.cat(alone).equal(together)


def test_a_query_that_sees_nothing_gives_0_and_moves_nothing() -> None:
    inputs = [drawn(1, 2, 6, 8).requires_grad_() for _ in range(3)]
    mask = torch.ones(6, 6, dtype=torch.bool).tril()[None, None].clone()
    mask[..., 2, :] = False
    found = few_keys.attention(*inputs, mask, is_causal=True, scale=SCALE)
    assert found[:, :, 2].eq(0).all()
    query, key, value = torch.autograd.grad(found.sum(), inputs)
    assert query[:, :, 2].eq(0).all()
    assert all(x.isfinite().all() for x in (query, key, value))


def test_large_tensors_are_left_to_torch_if_it_has_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small, large = (drawn(1, 1, n, 16) for n in (few_keys.MOST_KEYS, 8))
    large = large.expand(-1, 1 + elementwise.MOST_NUMBERS // 128, -1, -1)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=threads: count)
        assert few_keys.accepts(small, small, small)
        assert few_keys.accepts(large, large, large) == (threads == 1)
    many = drawn(1, 1, few_keys.MOST_KEYS + 1, 16)
    assert not few_keys.accepts(small, many, many)
    assert not few_keys.accepts(small[:, :, :1], small, small)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_lost(place: int, bad: float) -> None:
    inputs = [drawn(1, 1, 9, 8) for _ in range(3)]
    inputs[place][0, 0, 4, 3] = bad
    found = attention(*inputs, is_causal=True, scale=SCALE)
    assert not found[:, :, 4:].isfinite().all()
    if place < 2:  # a hidden value is multiplied by 0, as in the reference
        assert found[:, :, :4].isfinite().all()


def test_there_is_no_second_derivative() -> None:
    inputs = [drawn(1, 1, 4, 8).requires_grad_() for _ in range(3)]
    found = attention(*inputs, is_causal=True, scale=SCALE)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(found.square().sum(), inputs, create_graph=True)
