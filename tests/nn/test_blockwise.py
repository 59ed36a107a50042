"""Attention in blocks of queries against torch's, with gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.nn.blockwise import FEW_KEYS, blockwise_attention
from openmythos.nn.layout import TokenLayout

CPU = torch.device("cpu")


def case(seq: int, total: int, dtype: torch.dtype, kv_heads: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seq)

    def draw(heads: int, length: int, dim: int) -> Tensor:
        x = torch.randn(2, length, heads, dim, generator=generator).transpose(1, 2)
        return x.to(dtype).requires_grad_()

    return draw(4, seq, 24), draw(kv_heads, total, 24), draw(kv_heads, total, 16)


def assert_equals_torch(
    parts: tuple[Tensor, ...], mask: Tensor, use_mask: bool, window: int, tolerance: float
) -> None:
    query, key, value = parts
    found = blockwise_attention(query, key, value, mask if use_mask else None, window, 0.3)
    exact = [x.double() for x in parts]
    wanted = F.scaled_dot_product_attention(
        *exact, attn_mask=mask, scale=0.3, enable_gqa=key.shape[1] != query.shape[1]
    )
    assert found.dtype == query.dtype and found.shape == wanted.shape
    weight = torch.randn(wanted.shape, dtype=torch.double)
    grads = torch.autograd.grad((found.double() * weight).sum(), parts)
    others = torch.autograd.grad((wanted * weight).sum(), parts)
    pairs = zip((found.detach(), *grads), (wanted.detach(), *others), strict=True)
    for one, other in pairs:
        assert float((one - other).norm()) <= tolerance * (10 + float(other.norm()))


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("seq", [2, 64, 65, 200, FEW_KEYS + 70])
def test_plain_causal(seq: int, dtype: torch.dtype, tolerance: float) -> None:
    mask = torch.ones(seq, seq, dtype=torch.bool).tril()[None, None]
    assert_equals_torch(case(seq, seq, dtype), mask, False, 0, tolerance)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_fewer_key_heads_than_query_heads(kv_heads: int) -> None:
    mask = torch.ones(100, 100, dtype=torch.bool).tril()[None, None]
    assert_equals_torch(case(100, 100, torch.float32, kv_heads), mask, False, 0, 1e-5)


@pytest.mark.parametrize("start", [0, 1, 90, FEW_KEYS])
@pytest.mark.parametrize("window", [0, 1, 7, 100])
@pytest.mark.parametrize("padded", [False, True])
def test_masks_windows_and_earlier_keys(start: int, window: int, padded: bool) -> None:
    seq = 150
    valid = torch.ones(2, start + seq, dtype=torch.bool)
    valid[1, :70] = not padded
    mask, _ = TokenLayout(seq, start, CPU, valid).mask(window)
    assert mask is not None
    assert_equals_torch(case(seq, start + seq, torch.float32), mask, True, window, 1e-5)


def test_packed_documents_within_a_window() -> None:
    documents = (torch.arange(300)[None] // torch.tensor([[37], [111]])).expand(2, 300)
    mask, _ = TokenLayout(300, 0, CPU, None, documents).mask(90)
    assert mask is not None
    assert_equals_torch(case(300, 300, torch.float32), mask, True, 90, 1e-5)


def test_without_gradients_nothing_is_kept() -> None:
    query, key, value = case(200, 200, torch.float32)
    with torch.no_grad():
        quiet = blockwise_attention(query, key, value, None, 0, 0.3)
    assert torch.equal(quiet, blockwise_attention(query, key, value, None, 0, 0.3))
    assert not quiet.requires_grad
