"""Every kernel: fast = reference, forward and every gradient; and what its reference can do."""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import grad, jvp, vmap
from torch.overrides import _pop_mode_temporarily
from variants import here

from openmythos import kernels
from openmythos.kernels import attention as attention_kernels
from openmythos.kernels import experts as expert_kernels
from openmythos.kernels import gated as gated_kernels
from openmythos.kernels.attention import FEW_KEYS, FUSED_KEYS, attention
from openmythos.kernels.cross_entropy import IGNORE, linear_cross_entropy
from openmythos.kernels.experts import (
    SortedRows,
    count_rows,
    group_step,
    grouped_linear,
    grouped_outer,
    pad_groups,
    prepare,
    routed_experts,
)
from openmythos.kernels.gated import gated_linear
from openmythos.kernels.norm import rms_norm
from openmythos.kernels.rope import rotate
from openmythos.nn.layout import rope_tables

pytestmark = pytest.mark.usefixtures("device")


@dataclass(frozen=True)
class Case:
    """A kernel as a function of the tensors that it has gradients for, and their shapes.

    `small`: small enough for finite differences and for bf16 where it is emulated.
    """

    run: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    small: bool = True

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        drawn = [0.5 * torch.randn(shape, generator=generator) for shape in self.shapes]
        return [x.to(dtype).requires_grad_() for x in drawn]


def causal(seq: int, total: int, window: int = 0) -> Tensor:
    """[1, 1, seq, total]"""
    query, key = torch.arange(total - seq, total)[:, None], torch.arange(total)
    seen = key <= query
    return (seen & (key > query - window) if window else seen)[None, None]


def attend(
    seq: int,
    *,
    start: int = 0,
    kv_heads: int = 4,
    window: int = 0,
    mask: str = "",
    value_dim: int = 4,
    batch: int = 2,
) -> Case:
    """Attention of `seq` queries after `start` earlier keys."""
    total = start + seq

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        seen = causal(seq, total, window)
        if mask == "padded":
            valid = torch.arange(total) >= torch.tensor([0, total // 2])[:, None]
            itself = torch.arange(total) == torch.arange(start, total)[:, None]
            seen = (seen & valid[:, None, None]) | itself
        if mask == "documents":
            document = torch.arange(total)[None] // torch.tensor([[37], [111]])
            seen = seen & (document[:, None, start:, None] == document[:, None, None])
        if mask == "packed":  # the queries stand anywhere among the keys
            seen = torch.arange(total) <= torch.arange(total - seq)[:seq, None] // 2
            seen = seen[None, None]
        seen = seen.to(query.device)  # the compiler does not see `OnDevice`
        given: Any = {"mask": seen, "window": window, "packed": mask == "packed"}
        if mask == "none":  # every query sees every key
            given = {}
        elif not (window or mask or start):
            given = {"is_causal": seq > 1}
        return attention(query, key, value, scale=0.3, **given)

    heads = ((batch, 4, seq, 6), (batch, kv_heads, total, 6), (batch, kv_heads, total, value_dim))
    return Case(run, heads, small=total < 10)


def readout(tokens: int, ignored: bool = True) -> Case:
    targets = torch.arange(2 * tokens).view(2, tokens) * 7 % 20
    if ignored:
        targets[:, 1::3] = IGNORE

    def run(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, targets.to(hidden.device))

    return Case(run, ((2, tokens, 16), (20, 16)), small=tokens < 20)


def experts(
    *shape: int, top_k: int = 2, num_experts: int = 4, uses: int = 1, unused: bool = False
) -> Case:
    """`uses` calls one after the other with the weights prepared once, as in a loop."""

    scores = torch.rand(*shape, num_experts, generator=torch.Generator().manual_seed(1))
    if unused:
        scores[..., 1] = -1.0
    chosen = scores.topk(top_k).indices

    def run(x: Tensor, row_weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        weights = prepare(gate_up, down)
        for _ in range(uses):
            x = x + 0.3 * routed_experts(x, row_weights.sigmoid(), chosen.to(x.device), weights)
        return x

    small = math.prod(shape) < 100
    stacks = ((num_experts, 16, 16), (num_experts, 16, 8))
    return Case(run, ((*shape, 16), (*shape, top_k), *stacks), small)


def rotated(x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[-2], device=x.device)
    cos, sin = rope_tables(positions, x.shape[-1], 100.0)
    return rotate(x, cos, sin)


def normed(x: Tensor, weight: Tensor) -> Tensor:
    scale = torch.tensor([1e-2, 1.0, 1e2], dtype=x.dtype, device=x.device)
    return rms_norm(x * scale[:, None], weight, 1e-3)


CASES = {
    "norm": Case(normed, ((2, 3, 6), (6,))),
    "norm of one row": Case(lambda x, w: rms_norm(x, w, 1e-6), ((64,), (64,))),
    "rotation": Case(rotated, ((2, 3, 5, 8),)),
    "gated map": Case(gated_linear, ((2, 5, 16), (6, 8))),
    "gated map, transposed": Case(
        lambda x, w: gated_linear(x.transpose(0, 1), w), ((5, 2, 16), (6, 8))
    ),
    "gated map of rows": Case(gated_linear, ((5, 16), (6, 8))),
    "attention": attend(7),
    "attention, one query": attend(1, start=5),
    "attention, no mask": attend(3, start=2, mask="none"),
    "attention, one key-value head": attend(7, kv_heads=1, value_dim=6),
    "attention, two key-value heads": attend(3, start=3, kv_heads=2, value_dim=8),
    "attention, window": attend(7, window=3),
    "attention, padded": attend(5, start=2, mask="padded"),
    "attention, packed queries": attend(3, start=6, mask="packed"),
    "attention, blocks": attend(FUSED_KEYS + 20),
    "attention, many keys": attend(FEW_KEYS + 70, batch=1),
    "attention, blocks after keys": attend(150, start=90, window=100),
    "attention, blocks in a window": attend(150, start=FEW_KEYS, window=7, batch=1),
    "attention, padded blocks": attend(150, start=1, window=100, mask="padded"),
    "attention, documents": attend(300, window=90, mask="documents"),
    "cross-entropy": readout(5),
    "cross-entropy, all count": readout(1, ignored=False),
    "cross-entropy, two chunks": readout(kernels.CPU.chunk_tokens // 2 + 20),
    "experts": experts(12),
    "experts, batch": experts(2, 5, top_k=3),
    "experts, one token of many": experts(1, num_experts=16),
    "experts, none": experts(0),
    "experts, one unused": experts(9, top_k=1, unused=True),
    "experts, many uses": experts(8, uses=3),
    "experts, large groups": experts(160),
}
SMALL = {name: case for name, case in CASES.items() if case.small}
FIRST = {name: case for name, case in SMALL.items() if name != "experts, none"}
DTYPES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype)[6:]}")
    for name, case in CASES.items()
    for dtype in (torch.float64, torch.float32, torch.bfloat16)
    if dtype == torch.float32 or case.small or name == "experts, large groups"
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 3e-2}


def assert_fast_equals_reference(
    case: Case, dtype: torch.dtype, run: Callable[..., Tensor], tolerance: float = 0.0
) -> None:
    """Forward and every gradient, against the formula in fp64 on the same numbers."""
    inputs = case.inputs(dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with kernels.use("reference"):
        wanted = case.run(*exact)
        direction = torch.randn_like(wanted)
        wanted_grads = torch.autograd.grad(wanted, exact, direction)
    found = run(*inputs)
    assert found.shape == wanted.shape
    assert found.dtype == dtype or tolerance or found.ndim == 0
    tolerance = tolerance or TOLERANCE[dtype]
    grads = torch.autograd.grad(found, inputs, direction.to(found.dtype))
    with torch.no_grad():
        quiet = run(*inputs)
    wanted = wanted.detach()
    pairs = [(found.detach(), wanted), (quiet, wanted), *zip(grads, wanted_grads, strict=True)]
    for one, other in pairs:
        scale = float(other.norm()) + 1e-3 * max(1, other.numel()) ** 0.5
        assert float((one.double() - other).norm()) <= tolerance * scale
    assert all(one.dtype == dtype for one in grads)


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_fast_equals_reference(name: str, dtype: torch.dtype) -> None:
    assert_fast_equals_reference(CASES[name], dtype, CASES[name].run)


@pytest.mark.parametrize(
    "name", [n for n in SMALL if "attention" in n or "gated" in n or "experts" in n]
)
def test_fast_equals_reference_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As large tensors are computed: some rows of gates, some heads, one expert at a time."""
    monkeypatch.setattr(expert_kernels, "ROWS_IN_TURN", 0)
    monkeypatch.setattr(gated_kernels, "CACHED", 6)
    monkeypatch.setattr(attention_kernels, "CACHED_SCORES", 3 * 64 * 7)  # three of four heads
    monkeypatch.setattr(attention_kernels, "FUSED_KEYS", 0)
    assert_fast_equals_reference(CASES[name], torch.float32, CASES[name].run)


@pytest.mark.parametrize("name", SMALL)
def test_under_autocast_it_is_as_exact_as_in_bf16(name: str) -> None:
    """fp32 tensors come in, fp32 gradients come out; the backward pass runs outside of autocast."""
    case = CASES[name]

    def run(*inputs: Tensor) -> Tensor:
        with torch.autocast(here().type, torch.bfloat16):
            return case.run(*inputs)

    assert_fast_equals_reference(case, torch.float32, run, TOLERANCE[torch.bfloat16])


def together(cases: list[Case]) -> Case:
    """All outputs in one vector, so that they are compiled once."""
    sizes = [len(case.shapes) for case in cases]

    def run(*inputs: Tensor) -> Tensor:
        parts = [inputs[sum(sizes[:i]) : sum(sizes[: i + 1])] for i in range(len(cases))]
        outs = [case.run(*part) for case, part in zip(cases, parts, strict=True)]
        return torch.cat([out.flatten() for out in outs])

    return Case(run, tuple(shape for case in cases for shape in case.shapes))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.compile
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_equals_reference(backend: str) -> None:
    names = ("norm", "rotation", "gated map", "attention", "cross-entropy", "experts, many uses")
    case = together([CASES[name] for name in (*names, "experts, one token of many")])
    compiled = torch.compile(case.run, backend=backend, fullgraph=True)

    def run(*inputs: Tensor) -> Tensor:
        on_gpu = here().type == "cuda"
        with _pop_mode_temporarily() if on_gpu else nullcontext():  # `OnDevice` does not compile
            return compiled(*inputs)

    assert_fast_equals_reference(case, torch.float32, run)


@pytest.mark.parametrize("name", SMALL)
def test_both_forms_are_as_exact_in_bf16(name: str) -> None:
    """The reference in bf16 itself; against fp64 it is compared to the fast form above."""
    with kernels.use("reference"):
        assert_fast_equals_reference(CASES[name], torch.bfloat16, CASES[name].run)


# What references can do


@pytest.fixture
def reference() -> Iterator[None]:
    with kernels.use("reference"):
        yield


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", FIRST)
def test_derivatives_of_the_reference(name: str) -> None:
    """First ones both ways, and second ones, against finite differences."""
    run, inputs = FIRST[name].run, FIRST[name].inputs(torch.float64)
    torch.autograd.gradcheck(run, inputs, fast_mode=True, check_forward_ad=True)
    torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("name", FIRST)
def test_transforms_of_the_reference(name: str) -> None:
    """torch.func: a batch by vmap, and jvp of grad = the second derivative of hvp."""
    run, first, *others = FIRST[name].run, *FIRST[name].inputs(torch.float64)
    stack = torch.stack((first, 2 * first)).detach()
    both = vmap(lambda x: run(x, *others))(stack)
    torch.testing.assert_close(both, torch.stack([run(x, *others) for x in stack]))

    def value(x: Tensor) -> Tensor:
        return run(x, *others).square().sum()

    x, direction = first.detach(), torch.randn_like(first)
    found = jvp(grad(value), (x,), (direction,))[1]
    wanted = torch.autograd.functional.hvp(value, x, direction)[1]
    torch.testing.assert_close(found, wanted)


# Norm


@pytest.mark.parametrize("mode", [torch.inference_mode, FakeTensorMode])
def test_a_norm_trains_after_it_was_first_met_in_another_mode(mode: Any) -> None:
    eps = 0.0123 if mode is FakeTensorMode else 0.0321  # met nowhere else: it is cached
    with mode():
        rms_norm(torch.randn(2, 6), torch.ones(6), eps)
    x = torch.randn(2, 6, requires_grad=True)
    rms_norm(x, torch.ones(6), eps).sum().backward()
    assert x.grad is not None and type(x.grad) is Tensor


# Cross-entropy


def test_cross_entropy_follows_autocast() -> None:
    hidden, weight = readout(40).inputs(torch.float32)
    with torch.autocast(here().type, torch.bfloat16):
        found = readout(40).run(hidden, weight)
        logits = F.linear(hidden, weight)
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    targets = torch.arange(80) * 7 % 20
    counted = torch.arange(80) % 40 % 3 != 1
    wanted = F.cross_entropy(logits.float().flatten(0, 1)[counted], targets[counted])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert torch.autograd.grad(found, weight)[0].dtype == torch.float32


def test_no_target_that_counts_is_nan_as_in_torch() -> None:
    hidden, weight = readout(4).inputs(torch.float32)
    assert linear_cross_entropy(hidden, weight, torch.full((2, 4), IGNORE)).isnan()


# Experts


@pytest.mark.parametrize("ends", [[4, 9, 12], [0, 12, 12], [12, 12, 12], [0, 0, 12]])
def test_grouped_products_are_products_per_group(ends: list[int]) -> None:
    x, weight, left = torch.randn(12, 8), torch.randn(3, 16, 8), torch.randn(12, 16)
    offsets, groups = (
        torch.tensor(ends, dtype=torch.int32),
        list(zip([0, *ends], ends, strict=False)),
    )
    pieces = [x[a:b] @ w.T for (a, b), w in zip(groups, weight, strict=True)]
    torch.testing.assert_close(grouped_linear(x, weight, offsets), torch.cat(pieces))
    outer = torch.stack([left[a:b].T @ x[a:b] for a, b in groups])
    torch.testing.assert_close(grouped_outer(left, x, offsets), outer)


def test_the_operators_are_registered_properly() -> None:
    """Schema and fake kernels, as torch.compile relies on them."""
    x, weight = torch.randn(12, 8), torch.randn(3, 4, 8)
    ends = torch.tensor([4, 9, 12], dtype=torch.int32)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(grouped_linear, (x, weight, ends), test_utils=tests)
    torch.library.opcheck(grouped_outer, (x, torch.randn(12, 4), ends), test_utils=tests)


def test_gradients_are_summed_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all uses of the weights; a partial backward pass leaves nothing for the next."""
    case = experts(8, uses=3)
    inputs = case.inputs(torch.float32)
    added: list[int] = []
    is_wanted = expert_kernels._is_wanted

    def spy(ctx: Any, which: int) -> bool:
        found = is_wanted(ctx, which)
        added.extend([which] if found else [])
        return found

    monkeypatch.setattr(expert_kernels, "_is_wanted", spy)
    out = case.run(*inputs).square().sum()
    torch.autograd.grad(out, inputs[0], retain_graph=True)
    assert not added
    (found,) = torch.autograd.grad(out, inputs[3], retain_graph=True)
    assert added == [1] * 3
    (again,) = torch.autograd.grad(out, inputs[3])
    assert again.equal(found)
    with kernels.use("reference"):
        plain = case.run(*inputs).square().sum()
        (wanted,) = torch.autograd.grad(plain, inputs[3])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_frozen_experts_want_no_gradient() -> None:
    inputs = experts(8, uses=3).inputs(torch.float32)
    inputs[3].requires_grad_(False)
    experts(8, uses=3).run(*inputs).sum().backward()
    assert inputs[3].grad is None and inputs[2].grad is not None


@torch.no_grad()
def test_few_tokens_on_a_cpu_go_expert_by_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as the tuned constant says; the cases above compare the results."""
    calls: list[int] = []
    one_by_one = expert_kernels.per_expert_decode
    monkeypatch.setattr(
        expert_kernels, "per_expert_decode", lambda *a: (calls.append(len(a[0])), one_by_one(*a))[1]
    )
    tuned = replace(kernels.CPU, few_rows_per_expert=0.25)
    monkeypatch.setattr(kernels, "CPU", tuned)
    monkeypatch.setattr(kernels, "ACCELERATOR", tuned)
    for tokens in (1, 3, 4):
        case = experts(tokens, num_experts=24)
        case.run(*case.inputs(torch.float32))
    assert calls == [1, 3]


@torch.no_grad()
def test_gathered_weights_give_the_formula() -> None:
    """As decoding computes them on an accelerator, and, as sums of products, in compiled code."""
    tokens, shares, chosen = torch.randn(5, 8), torch.rand(5, 2), torch.rand(5, 6).topk(2)[1]
    weights = expert_kernels.ExpertWeights(torch.randn(6, 32, 8), torch.randn(6, 8, 16))
    wanted = expert_kernels.reference(tokens, shares, chosen, weights)
    eager = expert_kernels.gathered(tokens, shares, chosen, weights)
    torch.testing.assert_close(eager, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("step", [2, 8])
def test_padded_groups_hold_the_same_rows(step: int) -> None:
    chosen = torch.randint(6, (40, 2))
    counts = count_rows(chosen.flatten(), 6)
    order = chosen.flatten().argsort()
    ends = counts.cumsum(0).int()
    exact = SortedRows(torch.rand(80), order // 2, order.argsort().view(40, 2), ends)
    padded = pad_groups(exact, counts, step)
    sizes = padded.ends.diff(prepend=padded.ends.new_zeros(1))
    assert (sizes % step == 0).all() and (sizes >= counts).all() and (sizes - counts < step).all()
    owner = torch.searchsorted(padded.ends.long(), padded.place.flatten(), right=True)
    assert owner.equal(chosen.flatten())
    assert padded.source[padded.place].equal(exact.source[exact.place])
    assert padded.weights[padded.place].equal(exact.weights[exact.place])
    assert float(padded.weights.sum()) == pytest.approx(float(exact.weights.sum()))


def test_groups_in_bf16_on_a_cpu_are_padded_to_round_sizes() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert group_step(133, torch.float32, cpu) == group_step(133, torch.bfloat16, cuda) == 1
    assert group_step(133, torch.bfloat16, cpu) == 8  # rows per expert
    assert group_step(1, torch.bfloat16, cpu) == 1


def test_attention_goes_backward_in_the_pieces_of_its_forward_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """torch.compile may trace the forward pass and run the backward pass as it is."""
    monkeypatch.setattr(attention_kernels, "CACHED_SCORES", 64)
    query, key, value, grad = (torch.randn(3, 2, 9, 4, requires_grad=True) for _ in range(4))
    wanted = attention_kernels.reference(query, key, value, mask=None, is_causal=True, scale=0.5)
    gradients = torch.autograd.grad(wanted, (query, key, value), grad)
    with monkeypatch.context() as tracing:
        tracing.setattr(torch.compiler, "is_compiling", lambda: True)
        out = attention_kernels.blockwise_attention(query, key, value, None, 0, 0.5)
    torch.testing.assert_close(out, wanted)
    found = torch.autograd.grad(out, (query, key, value), grad.detach())
    for one, other in zip(found, gradients, strict=True):
        torch.testing.assert_close(one, other)
