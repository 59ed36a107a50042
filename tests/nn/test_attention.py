"""Attention layers: fast paths against plain ones, and what a token may see."""

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from torch import Tensor
from variants import here

from openmythos.config import ConfigError
from openmythos.nn.attention import AttentionLayer
from openmythos.nn.block import Attention, Block
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention, LatentAttentionLayer
from openmythos.nn.layout import AttentionContext, TokenLayout, attention_context
from openmythos.nn.linear import NO_DELTAS, Deltas, Linear, LowRank
from openmythos.nn.rope_scaling import YarnScaling
from openmythos.nn.view import Cached, Halting, LayerView, NoCache

DIM, EPS = 32, 1e-6
pytestmark = pytest.mark.usefixtures("device")
SMALL: dict[str, dict[str, Any]] = {
    "latent": {
        "num_heads": 4,
        "kv_latent_dim": 12,
        "q_latent_dim": 10,
        "nope_head_dim": 8,
        "rope_head_dim": 4,
        "value_head_dim": 6,
    },
    "grouped_query": {"num_heads": 4, "num_kv_heads": 2},
}


def small(kind: type, **fields: Any) -> Any:
    return kind(**SMALL.get(kind().kind, {}) | fields)


VARIANTS = {
    f"{kind().kind}-window{window}-{'norm' if qk_norm else 'raw'}-{position}": small(
        kind, window=window, qk_norm=qk_norm, position=position
    )
    for kind, window, qk_norm, position in itertools.product(
        get_args(Attention), (0, 3), (False, True), ("rope", "none")
    )
}
VARIANTS |= {
    "grouped_query-plain_norm": small(
        GroupedQueryAttention, qk_norm=True, qk_norm_kind="plain", qk_bias=True
    ),
    "grouped_query-width_norm": small(
        GroupedQueryAttention, qk_norm=True, qk_norm_kind="width", head_dim=6
    ),
    "grouped_query-partial": small(GroupedQueryAttention, rope_dim=2),
    "grouped_query-yarn": small(GroupedQueryAttention, rope_scaling=YarnScaling()),
}
LATENT_VARIANTS = {
    name: config for name, config in VARIANTS.items() if isinstance(config, LatentAttention)
} | {"latent-direct_query": small(LatentAttention, q_latent_dim=0)}


@torch.no_grad()
def build(config: Any) -> Any:
    """A layer in double precision with random weights and norms."""
    layer = config.build(DIM, EPS).double().to(here())
    for name, parameter in layer.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        parameter.normal_(mean, 0.3 if mean else 1.5 * parameter.shape[-1] ** -0.5)
    return layer


def context_of(config: Any, layout: TokenLayout) -> AttentionContext:
    return attention_context(layout, config, DIM)


def layouts(seq: int, batch: int) -> dict[str, TokenLayout]:
    """Every way in which tokens can stand in a batch."""
    valid = torch.arange(seq) >= torch.arange(batch)[:, None]
    documents = (torch.arange(seq) >= seq // 2 + torch.arange(batch)[:, None]).long()
    return {
        "whole": TokenLayout(seq, 0, here()),
        "padded": TokenLayout(seq, 0, here(), valid),
        "packed": TokenLayout(seq, 0, here(), None, documents),
        "packed_and_padded": TokenLayout(seq, 0, here(), valid, documents),
        "chunk": TokenLayout(2, seq - 2, here()),
        "padded_chunk": TokenLayout(2, seq - 2, here(), valid),
        "one_token": TokenLayout(1, seq - 1, here()),
        "one_padded_token": TokenLayout(1, seq - 1, here(), valid),
        "first_token": TokenLayout(1, 0, here()),
    }


def self_attention(layer: AttentionLayer, x: Tensor, context: AttentionContext) -> Tensor:
    return layer(x, layer.project_kv(x, context), context)


@contextmanager
def path(layer: AttentionLayer, absorbed: bool) -> Iterator[None]:
    """Force one of the two paths of latent attention; others have only one."""
    if not isinstance(layer, LatentAttentionLayer):
        yield
        return
    taken, other = ("absorbed", "naive") if absorbed else ("naive", "absorbed")
    setattr(layer, other, getattr(layer, taken))
    try:
        yield
    finally:
        delattr(layer, other)


def manual_attend(query: Tensor, key: Tensor, value: Tensor, allowed: Tensor, scale: float) -> Any:
    """Softmax attention, written out."""
    group = query.shape[1] // key.shape[1]
    heads = []
    for head in range(query.shape[1]):
        scores = scale * query[:, head] @ key[:, head // group].transpose(1, 2)
        scores = scores.masked_fill(~allowed, -math.inf)
        weights = scores.exp() / scores.exp().sum(dim=-1, keepdim=True)
        heads.append(weights @ value[:, head // group])
    return torch.stack(heads, dim=1)


def allowed_by_definition(layout: TokenLayout, window: int, batch: int) -> Tensor:
    """[batch, seq, total]: who may attend to whom, one pair at a time."""
    total = layout.start + layout.seq
    out = torch.zeros(batch, layout.seq, total, dtype=torch.bool)
    for row, query, key in itertools.product(
        range(batch), range(layout.start, total), range(total)
    ):
        documents, valid = layout.documents, layout.valid
        seen = key <= query and (window == 0 or query - key < window)
        seen = seen and (documents is None or bool(documents[row, query] == documents[row, key]))
        seen = seen and (valid is None or bool(valid[row, key]))
        # A padding token sees itself, so that its softmax is over something.
        out[row, query - layout.start, key] = seen or (valid is not None and key == query)
    return out


@pytest.mark.parametrize("window", [0, 1, 3, 7, 100])
@pytest.mark.parametrize("name", layouts(7, 3))
def test_the_mask_is_its_definition(name: str, window: int) -> None:
    layout = layouts(7, 3)[name]
    mask, is_causal = layout.mask(window)
    expected = allowed_by_definition(layout, window, 3)
    if mask is None:
        causal = torch.ones(layout.seq, layout.start + layout.seq, dtype=torch.bool)
        assert expected.equal((causal.tril() if is_causal else causal).expand_as(expected))
    else:
        assert not is_causal
        assert mask.expand(3, 1, -1, -1).squeeze(1).equal(expected)


def test_positions_count_valid_tokens() -> None:
    valid = torch.tensor([[True] * 4, [False, False, True, True]])
    assert TokenLayout(4, 0, here(), valid).positions().tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert TokenLayout(2, 2, here(), valid).positions().tolist() == [[2, 3], [0, 1]]
    assert TokenLayout(2, 3, here()).positions().tolist() == [[3, 4]]


def split(query: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The parts of a latent attention's query: without position and with it."""
    return query[..., :8], query[..., 8:]


def test_latent_attention_is_its_formula() -> None:
    """The naive path against manual attention on keys built head by head."""
    config = small(LatentAttention)
    layer = build(config)
    x = torch.randn(2, 5, DIM, dtype=torch.double)
    layout = TokenLayout(5, 0, here())
    context = context_of(config, layout)
    kv = layer.project_kv(x, context)
    latent, rope_key = kv[..., :12], kv[..., 12:]
    up = layer.kv_up.weight.view(4, 14, 12)
    keys = [torch.cat((latent @ up[h, :8].T, rope_key), dim=-1) for h in range(4)]
    values = [latent @ up[h, 8:].T for h in range(4)]
    query = torch.randn(2, 4, 5, 12, dtype=torch.double)
    expected = manual_attend(
        query,
        torch.stack(keys, dim=1),
        torch.stack(values, dim=1),
        allowed_by_definition(layout, 0, 2),
        12**-0.5,
    )
    torch.testing.assert_close(layer.naive(*split(query), kv, context, NO_DELTAS), expected)
    torch.testing.assert_close(layer.absorbed(*split(query), kv, context, NO_DELTAS), expected)


def random_deltas(layer: AttentionLayer) -> Deltas:
    """A delta for every linear map of the layer, registered under its name."""
    deltas = {}
    for name, module in layer.named_modules():
        if isinstance(module, Linear):
            module.delta_key = name
            deltas[name] = LowRank(
                0.3 * torch.randn(2, module.in_features, dtype=torch.double).requires_grad_(),
                0.3 * torch.randn(module.out_features, 2, dtype=torch.double).requires_grad_(),
            )
    return {
        key: LowRank(*(x.detach().requires_grad_() for x in d[:2])) for key, d in deltas.items()
    }


@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "deltas"])
@pytest.mark.parametrize("layout_name", layouts(6, 3))
@pytest.mark.parametrize("name", LATENT_VARIANTS)
def test_absorbed_equals_naive(name: str, layout_name: str, adapted: bool) -> None:
    config, layout = LATENT_VARIANTS[name], layouts(6, 3)[layout_name]
    layer = build(config)
    deltas = random_deltas(layer) if adapted else NO_DELTAS
    x = torch.randn(3, layout.seq, DIM, dtype=torch.double, requires_grad=True)
    older = torch.randn(3, layout.start, layer.kv_width, dtype=torch.double, requires_grad=True)
    context = context_of(config, layout)
    wrt = [x, older, *layer.parameters(), *(t for d in deltas.values() for t in d[:2])]
    direction = torch.randn(3, layout.seq, DIM, dtype=torch.double)

    def run(absorbed: bool) -> tuple[Tensor, ...]:
        with path(layer, absorbed):
            kv = torch.cat((older, layer.project_kv(x, context, deltas)), dim=1)
            out = layer(x, kv, context, deltas)
        return out, *torch.autograd.grad(out, wrt, direction)

    torch.testing.assert_close(run(True), run(False), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("absorbed", [False, True])
@pytest.mark.parametrize("layout_name", ["padded", "one_token"])
@pytest.mark.parametrize("kind", get_args(Attention))
def test_rows_with_deltas_of_their_own_equal_each_row_alone(
    kind: type, layout_name: str, absorbed: bool
) -> None:
    """As rows of a batch have them that run different loops."""
    config, layout = small(kind), layouts(6, 3)[layout_name]
    layer, context = build(config), context_of(config, layout)
    rows = [random_deltas(layer) for _ in range(3)]
    deltas = {
        key: LowRank(*(torch.stack(x) for x in zip(*(row[key][:2] for row in rows), strict=True)))
        for key in rows[0]
    }
    x = torch.randn(3, layout.seq, DIM, dtype=torch.double)
    older = torch.randn(3, layout.start, layer.kv_width, dtype=torch.double)

    def run(row: slice, deltas: Deltas) -> Tensor:
        visible = context.select(slice(row.start, row.stop))
        kv = torch.cat((older[row], layer.project_kv(x[row], visible, deltas)), dim=1)
        return layer(x[row], kv, visible, deltas)

    with path(layer, absorbed):
        alone = torch.cat([run(slice(i, i + 1), rows[i]) for i in range(3)])
        torch.testing.assert_close(run(slice(0, 3), deltas), alone, atol=1e-10, rtol=1e-10)


def test_deltas_reach_every_map() -> None:
    """Also on the absorbed path, which never applies kv_up as a map."""
    for kind in get_args(Attention):
        config = small(kind)
        layer = build(config)
        deltas = random_deltas(layer)
        assert len(deltas) >= 4
        x = torch.randn(2, 5, DIM, dtype=torch.double)
        context = context_of(config, TokenLayout(5, 0, here()))
        for absorbed in (True, False):
            with path(layer, absorbed):
                out = layer(x, layer.project_kv(x, context, deltas), context, deltas)
            wrt = [t for d in deltas.values() for t in d[:2]]
            grads = torch.autograd.grad(out.square().sum(), wrt)
            assert all(grad.any() for grad in grads)


def test_the_cheaper_path_is_taken() -> None:
    config = small(LatentAttention)
    layer, calls = config.build(DIM, EPS).to(here()), []
    for name in ("naive", "absorbed"):
        original = getattr(layer, name)

        def spy(*args: Any, name: str = name, original: Any = original) -> Tensor:
            calls.append(name)
            return original(*args)

        setattr(layer, name, spy)
    head_dims, latent = config.nope_head_dim + config.value_head_dim, config.kv_latent_dim
    for seq, total in ((64, 64), (1, 64), (1, 1), (2, 3), (30, 64), (4, 64), (8, 64)):
        x, kv = torch.randn(1, seq, DIM), torch.randn(1, total, layer.kv_width)
        layer(x, kv, context_of(config, TokenLayout(seq, total - seq, here())))
        expanding, rope = latent * head_dims, config.rope_head_dim
        naive = total * expanding + seq * total * (head_dims + rope)
        absorbed = seq * expanding + seq * total * (2 * latent + rope)
        assert calls.pop() == ("absorbed" if absorbed < naive else "naive")


@pytest.mark.parametrize(
    ("name", "absorbed"),
    [*((name, False) for name in VARIANTS), *((name, True) for name in LATENT_VARIANTS)],
)
def test_no_gradient_from_the_future_or_beyond_the_window(name: str, absorbed: bool) -> None:
    config, seq = (VARIANTS | LATENT_VARIANTS)[name], 7
    layer = build(config)
    x = torch.randn(2, seq, DIM, dtype=torch.double, requires_grad=True)
    with path(layer, absorbed):
        out = self_attention(layer, x, context_of(config, TokenLayout(seq, 0, here())))
    for position in range(seq):
        target = out[:, position].square().sum()
        (grad,) = torch.autograd.grad(target, x, retain_graph=True)
        reach = grad.ne(0).any(dim=-1)
        first = max(0, position - config.window + 1) if config.window else 0
        inside = torch.arange(seq).le(position) & torch.arange(seq).ge(first)
        assert reach.equal(inside.expand_as(reach))


@pytest.mark.parametrize("name", VARIANTS)
def test_left_padding_changes_nothing(name: str) -> None:
    config, seq = VARIANTS[name], 8
    layer = build(config)
    padding = torch.tensor([0, 2, 5])
    valid = torch.arange(seq) >= padding[:, None]
    x = torch.randn(3, seq, DIM, dtype=torch.double, requires_grad=True)
    out = self_attention(layer, x, context_of(config, TokenLayout(seq, 0, here(), valid)))
    assert out.isfinite().all()
    for row, pad in enumerate(padding.tolist()):
        context = context_of(config, TokenLayout(seq - pad, 0, here()))
        alone = self_attention(layer, x[row : row + 1, pad:], context)
        torch.testing.assert_close(out[row : row + 1, pad:], alone, atol=1e-9, rtol=1e-9)
    (grad,) = torch.autograd.grad(out[valid].square().sum(), x)
    assert not grad[~valid].any() and grad[valid].any(dim=-1).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_equal_separate_ones(name: str) -> None:
    config, lengths = VARIANTS[name], (3, 1, 4)
    layer = build(config)
    documents = torch.repeat_interleave(torch.tensor([5, 2, 9]), torch.tensor(lengths))[None]
    x = torch.randn(1, sum(lengths), DIM, dtype=torch.double, requires_grad=True)
    layout = TokenLayout(sum(lengths), 0, here(), None, documents)
    out = self_attention(layer, x, context_of(config, layout))
    for document in range(3):
        start = sum(lengths[:document])
        inside = slice(start, start + lengths[document])
        context = context_of(config, TokenLayout(lengths[document], 0, here()))
        alone = self_attention(layer, x[:, inside], context)
        # Positions differ by an offset, and the tables are fp32.
        torch.testing.assert_close(out[:, inside], alone, atol=1e-5, rtol=1e-5)
        (grad,) = torch.autograd.grad(out[:, inside].square().sum(), x, retain_graph=True)
        outside = torch.ones(sum(lengths), dtype=torch.bool)
        outside[inside] = False
        assert not grad[:, outside].any()


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("name", VARIANTS)
def test_cached_keys_and_values_give_the_whole_pass(name: str, chunk: int, padded: bool) -> None:
    """Through a block and a cache's slot; latent attention changes its path on the way."""
    config, seq, batch = VARIANTS[name], 9, 2
    block = Block(DIM, config, SwiGLU(hidden_dim=8), EPS).double().eval().to(here())
    valid = torch.arange(seq) >= torch.tensor([0, 4])[:, None] if padded else None
    x = torch.randn(batch, seq, DIM, dtype=torch.double)
    kept = Halting(NoCache(), None)
    whole, _ = block(x, LayerView(context_of(config, TokenLayout(seq, 0, here(), valid)), kept))
    storage = torch.zeros(batch, seq, block.attention.kv_width, dtype=torch.double)
    outputs = []
    for start in range(0, seq, chunk):
        seen = None if valid is None else valid[:, : start + chunk]
        context = context_of(config, TokenLayout(chunk, start, here(), seen))
        view = LayerView(context, Cached(storage, start, chunk))
        outputs.append(block(x[:, start : start + chunk], view)[0])
    real = slice(None) if valid is None else valid
    torch.testing.assert_close(torch.cat(outputs, dim=1)[real], whole[real])
    torch.testing.assert_close(storage, kept.kv)


@pytest.mark.parametrize("name", VARIANTS)
def test_kv_width_is_what_is_stored(name: str) -> None:
    config = VARIANTS[name]
    layer = config.build(DIM, EPS).to(here())
    x = torch.randn(2, 5, DIM)
    kv = layer.project_kv(x, context_of(config, TokenLayout(5, 0, here())))
    assert kv.shape == (2, 5, layer.kv_width)
    assert layer.kv_width == config.kv_width(DIM)
    if isinstance(config, LatentAttention):
        assert layer.kv_width == config.kv_latent_dim + config.rope_head_dim
    else:
        assert layer.kv_width == 2 * config.num_kv_heads * config.size(DIM)


def test_one_rotary_key_serves_all_heads_of_latent_attention() -> None:
    config = small(LatentAttention)
    layer = build(config)
    x = torch.randn(1, 5, DIM, dtype=torch.double)
    early = layer.project_kv(x, context_of(config, TokenLayout(5, 0, here())))
    late = layer.project_kv(x, context_of(config, TokenLayout(5, 7, here())))
    assert early[..., :12].equal(late[..., :12])  # the latent knows no position
    assert not torch.isclose(early[..., 12:], late[..., 12:]).any()
    # The same four numbers enter the scores of every head.
    kv = early.detach().requires_grad_()
    query = torch.randn(1, 4, 5, 12, dtype=torch.double)
    context = context_of(config, TokenLayout(5, 0, here()))
    out = layer.naive(*split(query), kv, context, NO_DELTAS)
    for head in range(4):
        (grad,) = torch.autograd.grad(out[:, head].square().sum(), kv, retain_graph=True)
        assert grad[..., 12:].any()


@pytest.mark.parametrize("kind", get_args(Attention))
def test_without_positions_only_order_by_mask_remains(kind: type) -> None:
    """The last token sees a set: its output does not depend on the order of the others."""
    order = torch.tensor([3, 1, 0, 2, 4])
    x = torch.randn(1, 5, DIM, dtype=torch.double)
    for position, invariant in (("none", True), ("rope", False)):
        config = small(kind, position=position)
        layer, context = build(config), context_of(config, TokenLayout(5, 0, here()))
        last = self_attention(layer, x, context)[:, -1]
        shuffled = self_attention(layer, x[:, order], context)[:, -1]
        assert torch.allclose(last, shuffled) == invariant


@pytest.mark.parametrize("kind", get_args(Attention))
def test_qk_norm_bounds_the_scores(kind: type) -> None:
    """Weights a hundred times as large leave normalised attention as it was."""
    for qk_norm, invariant in ((True, True), (False, False)):
        config = small(
            kind, qk_norm=qk_norm, **({"q_latent_dim": 0} if kind is LatentAttention else {})
        )
        layer = build(config)
        x = torch.randn(1, 5, DIM, dtype=torch.double)
        context = context_of(config, TokenLayout(5, 0, here()))
        before = self_attention(layer, x, context)
        with torch.no_grad():
            layer.query.weight.mul_(100)
        close = torch.allclose(self_attention(layer, x, context), before, atol=1e-5)
        assert close == invariant


def test_rows_of_a_context_can_be_cut_and_reordered() -> None:
    valid = torch.arange(4) >= torch.arange(3)[:, None]
    context = context_of(small(GroupedQueryAttention), TokenLayout(4, 0, here(), valid))
    assert context.cos is not None and context.mask is not None
    cut, order = context.select(slice(1, 3)), torch.tensor([2, 0, 1])
    taken = context.select(order)
    assert cut.cos is not None and cut.mask is not None
    assert cut.positions.equal(context.positions[1:3])
    assert cut.cos.equal(context.cos[1:3]) and cut.mask.equal(context.mask[1:3])
    assert taken.cos is not None and taken.mask is not None
    assert taken.cos.equal(context.cos[order]) and taken.mask.equal(context.mask[order])
    # One row for the whole batch serves any part of it.
    shared = context_of(small(GroupedQueryAttention, window=2), TokenLayout(4, 0, here()))
    for part in (shared.select(slice(1, 3)), shared.select(order)):
        assert part.cos is shared.cos and part.mask is shared.mask


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (GroupedQueryAttention, {"num_heads": 6, "num_kv_heads": 4}, "num_kv_heads = 4"),
        (GroupedQueryAttention, {"num_heads": 0}, "num_heads = 0"),
        (GroupedQueryAttention, {"window": -1}, "window = -1"),
        (GroupedQueryAttention, {"rope_base": 0.0}, "rope_base = 0.0"),
        (LatentAttention, {"rope_head_dim": 5}, "rope_head_dim = 5"),
        (LatentAttention, {"rope_head_dim": 0}, "rope_head_dim = 0"),
        (LatentAttention, {"q_latent_dim": -1}, "q_latent_dim = -1"),
        (LatentAttention, {"kv_latent_dim": 0}, "kv_latent_dim = 0"),
        (LatentAttention, {"window": -1}, "window = -1"),
    ],
)
def test_impossible_settings_are_refused(kind: type, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        kind(**fields)


@pytest.mark.parametrize(("dim", "fits"), [(32, True), (30, False), (20, False)])
def test_heads_must_fit_the_width(dim: int, fits: bool) -> None:
    config = small(GroupedQueryAttention)  # 4 heads
    if fits:
        config.check(dim)
        return
    with pytest.raises(ConfigError, match="num_heads = 4"):
        config.check(dim)
    if dim % 4 == 0:  # an odd head_dim cannot be rotated, but can do without
        small(GroupedQueryAttention, position="none").check(dim)


def test_partial_rotation_leaves_the_other_features_as_they_are() -> None:
    config = small(GroupedQueryAttention, rope_dim=2)
    layer, x = build(config), torch.randn(1, 5, DIM, dtype=torch.double, device=here())
    near, far = (context_of(config, TokenLayout(5, start, here())) for start in (0, 7))
    width = layer.head_dim
    moved = (layer.project_kv(x, near) != layer.project_kv(x, far)).view(5, -1, width).any(dim=0)
    keys = moved[: config.num_kv_heads]
    assert keys[:, :2].all() and not keys[:, 2:].any() and not moved[config.num_kv_heads :].any()
