"""Rotary positions: a rotation, relative, exact at any length and in any dtype of the model."""

import cmath
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from openmythos.kernels.rope import rotate
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.block import Attention
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.layout import TokenLayout, attention_context, rope_tables

BASE = 10_000.0


def rotated(x: Tensor, position: int) -> Tensor:
    """x [..., dim] at one position."""
    cos, sin = rope_tables(torch.tensor(position), x.shape[-1], BASE)
    return rotate(x, cos, sin)


def test_tables_are_real_and_fp32() -> None:
    positions = torch.arange(12).view(3, 4)
    for table in rope_tables(positions, 6, BASE):
        assert table.shape == (3, 4, 6)
        assert table.dtype == torch.float32 and not table.is_complex()


def test_pairs_turn_like_complex_numbers() -> None:
    """(x_i, x_{i + d/2}) times exp(i * position * base^(-2i/d))."""
    x = torch.randn(8, dtype=torch.double)
    for position in (0, 1, 17):
        out = rotated(x, position)
        for i in range(4):
            turn = cmath.exp(1j * position * BASE ** (-2 * i / 8))
            expected = complex(x[i], x[i + 4]) * turn
            assert complex(out[i], out[i + 4]) == pytest.approx(expected, abs=1e-5)


def test_rotation_preserves_the_norm_of_every_pair() -> None:
    x = torch.randn(5, 8)
    for position in (0, 3, 1000):
        out = rotated(x, position)
        pairs = x.view(5, 2, 4).norm(dim=1)
        torch.testing.assert_close(out.view(5, 2, 4).norm(dim=1), pairs)
        torch.testing.assert_close(out.norm(dim=-1), x.norm(dim=-1))


def test_position_zero_is_the_identity() -> None:
    x = torch.randn(5, 8)
    assert rotated(x, 0).equal(x)


def test_scores_depend_on_distance_alone() -> None:
    query, key = torch.randn(2, 16)
    by_distance = []
    for distance in range(10):
        scores = [rotated(query, at + distance) @ rotated(key, at) for at in (0, 5, 200)]
        torch.testing.assert_close(scores, [scores[0]] * 3, atol=1e-4, rtol=1e-4)
        by_distance.append(scores[0])
    assert torch.stack(by_distance).std() > 0.1


def test_dtype_of_the_vectors_is_kept() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert rotated(torch.randn(8, dtype=dtype), 3).dtype == dtype


def test_no_rotation_without_tables() -> None:
    context = attention_context(
        TokenLayout(4, 0, torch.device("cpu")), GroupedQueryAttention(position="none"), 8
    )
    x = torch.randn(2, 3, 4, 8)
    assert context.cos is None and context.sin is None
    assert rotate(x, context.cos, context.sin) is x


SIZES: dict[str, dict[str, Any]] = {"grouped_query": {"num_heads": 4, "num_kv_heads": 2}}


def model_with(attention: type) -> OpenMythos:
    config = MythosConfig(
        dim=32,
        context=4096,
        attention=attention(**SIZES.get(attention().kind, {})),
        zero_init_outputs=False,
    )
    return OpenMythos(config, seed=0).eval()


@pytest.mark.parametrize("attention", get_args(Attention))
def test_no_checkpoint_holds_positions_or_a_length(attention: type) -> None:
    model = model_with(attention)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    assert {name for name, _ in tensors} == set(model.state_dict())
    assert not [name for name, tensor in tensors if 4096 in tensor.shape or tensor.is_complex()]
    assert not [name for name in model.state_dict() if "rope" in name or "freq" in name]


@torch.no_grad()
@pytest.mark.parametrize("attention", get_args(Attention))
def test_a_bf16_model_still_knows_far_positions(attention: type) -> None:
    """bf16 cannot tell position 3001 from 3002; the tables are made in fp32 all the same."""
    model = model_with(attention)
    config, layer = model.config.attention, model.prelude[0].attention
    layout = TokenLayout(3, 3000, torch.device("cpu"))

    def keys() -> Tensor:
        context = attention_context(layout, config, 32)
        assert context.cos is not None and context.cos.dtype == torch.float32
        x = torch.ones(1, 3, 32, dtype=layer.output.weight.dtype)
        return layer.project_kv(x, context).float()

    exact = keys()
    assert (exact[:, 1:] - exact[:, :-1]).abs().amax() > 0.1
    model.to(torch.bfloat16)
    torch.testing.assert_close(keys(), exact, atol=0.03, rtol=0.03)
