"""A training step: accumulation, routers, precision, and every variant of every training choice."""

from dataclasses import replace
from functools import partial
from typing import Any, get_args

import pytest
import torch
from variants import assert_gradients_close, gradients, members, name_of, tiny, tiny_config

from openmythos.config import apply_overrides
from openmythos.data.loader import Loader
from openmythos.data.shards import TokenShards, write_shards
from openmythos.data.sources import Document
from openmythos.data.tokenizer import ByteTokenizer
from openmythos.model.mythos import OpenMythos
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.moe import MoE, MoELayer
from openmythos.planning import cost
from openmythos.recurrence.halting import ACT, ExitGate, Halting
from openmythos.recurrence.initial_state import NormalState, ZeroState
from openmythos.recurrence.injections import Injection
from openmythos.recurrence.loop_sampling import (
    FixedLoops,
    LoopCurriculum,
    LoopSampling,
    NoCurriculum,
    PoissonLoops,
    UniformLoops,
    sample_loops,
)
from openmythos.train import trainer as trainer_module
from openmythos.train.config import RunConfig, TrainConfig
from openmythos.train.guards import NoSpikes, Rollback
from openmythos.train.loss import ExpectedLoss, Loss
from openmythos.train.optim import AdamW, Muon, Optimizer, Schedule
from openmythos.train.trainer import StepMetrics, Trainer

SEQ, BATCH = 32, 4
MODEL = tiny_config(vocab_size=257, context=SEQ)
TRAIN = TrainConfig(
    num_steps=2,
    batch_size=BATCH,
    seq_len=SEQ,
    loops=FixedLoops(mean_loops=2),
    optimizer=AdamW(),
    precision="fp32",
)
PER_SEQUENCE = UniformLoops(min_loops=1, max_loops=4)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 5) for i in range(60)]
    documents = [Document(name=str(i), text=text) for i, text in enumerate(texts)]
    return write_shards(documents, ByteTokenizer(), tmp_path_factory.mktemp("shards"))


def trainer_of(shards: TokenShards, model: Any = MODEL, **changes: Any) -> Trainer:
    config = replace(TRAIN, **changes)
    loader = Loader(shards, seq_len=SEQ, batch_size=BATCH, seed=config.seed)
    return Trainer(OpenMythos(model, seed=0), loader, config)


def train(shards: TokenShards, model: Any = MODEL, **changes: Any) -> list[StepMetrics]:
    return list(trainer_of(shards, model, **changes).steps())


def test_a_model_is_not_asked_to_stop_once_its_training_has_ended(shards: TokenShards) -> None:
    asked = 0

    def stopping() -> bool:
        nonlocal asked
        asked += 1
        return asked > 5

    trained = trainer_of(shards)
    trainer = Trainer(trained.model, trained.source, trained.config, stopping)
    assert list(trainer.steps()) == [] and trainer.stopping
    assert not any(module._forward_hooks for module in trainer.model.modules())
    trainer.model(torch.zeros(1, 4, dtype=torch.long))


def losses(metrics: list[StepMetrics]) -> list[float]:
    return [metric.loss for metric in metrics]


def assert_finite(metrics: list[StepMetrics], steps: int = 2) -> None:
    assert [metric.step for metric in metrics] == list(range(steps))
    for metric in metrics:
        values = metric.as_dict()
        values.pop("max_decay")  # nan where there is no decay
        values["flops"] /= 1e9
        values["state_rms"] = sum(values["state_rms"])
        values["residual"] = sum(values["residual"])
        assert all(value == value and abs(value) < 1e6 for value in values.values()), values


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("loops", [FixedLoops(mean_loops=3), PER_SEQUENCE], ids=name_of)
def test_micro_batches_add_up_to_the_batch(shards: TokenShards, loops: Any, micro: int) -> None:
    found = {}
    for size in (0, micro):
        trainer = trainer_of(shards, loops=loops, micro_batch_size=size)
        trainer.model.train()
        batch = trainer.source.batch(0)
        counts = torch.tensor([4, 1, 3, 2]) if loops is PER_SEQUENCE else torch.full((BATCH,), 3)
        parts, router, _ = trainer._backward(batch, counts)
        found[size] = parts, router, gradients(trainer.model)
        (stats,) = router.values()
        moe = MODEL.recurrent_feed_forward
        assert isinstance(moe, MoE)
        assert float(stats.counts.sum()) == int(counts.sum()) * SEQ * moe.top_k
        assert float(stats.tokens) == int(counts.sum()) * SEQ
        assert float(stats.sequences) == int(counts.sum())
    (whole, router, wanted), (pieces, router_pieces, grads) = found[0], found[micro]
    torch.testing.assert_close(pieces.cross_entropy, whole.cross_entropy)
    for name, stats in router.items():
        assert torch.equal(router_pieces[name].counts, stats.counts)
        torch.testing.assert_close(router_pieces[name].balance, stats.balance)
    if loops is not PER_SEQUENCE:  # else the balance loss weighs each micro-batch's loops alike
        torch.testing.assert_close(pieces.total, whole.total)
        assert_gradients_close(grads, wanted)


def test_micro_batches_take_the_same_steps(shards: TokenShards) -> None:
    whole = train(shards, num_steps=4)
    pieces = train(shards, num_steps=4, micro_batch_size=1)
    assert losses(pieces) == pytest.approx(losses(whole), rel=1e-4)
    norms = [metric.gradient_norm for metric in whole]
    assert [metric.gradient_norm for metric in pieces] == pytest.approx(norms, rel=1e-3)


@pytest.mark.parametrize("decays", [False, True])
def test_router_bias_moves_after_each_step(shards: TokenShards, decays: bool) -> None:
    moe = tiny(MoE, bias_rate=0.01, bias_decays=decays)
    trainer = trainer_of(shards, replace(MODEL, recurrent_feed_forward=moe), num_steps=3)
    layer = trainer.model.recurrent.layers[0].feed_forward
    assert isinstance(layer, MoELayer)
    former = layer.router.router_bias.clone()
    scales = []
    for metrics in trainer.steps():
        scales.append(metrics.lr_scale)
        step = 0.01 * (metrics.lr_scale if decays else 1)
        moved = layer.router.router_bias - former
        assert bool(((moved.abs() - step).abs() < 1e-6).any())
        assert bool((moved.abs() < 1.01 * step).all())
        former = layer.router.router_bias.clone()
    assert len(set(scales)) > 1


def test_violation_falls_from_a_skewed_start(shards: TokenShards) -> None:
    moe = tiny(MoE, num_experts=8, bias_rate=0.05, balance_weight=0.0)
    trainer = trainer_of(shards, replace(MODEL, recurrent_feed_forward=moe), num_steps=40)
    layer = trainer.model.recurrent.layers[0].feed_forward
    assert isinstance(layer, MoELayer)
    layer.router.router_bias[:2] = 1.0  # all tokens to two of eight experts
    violations = [metric.max_violation for metric in trainer.steps()]
    assert violations[0] == pytest.approx(3.0)
    assert sum(violations[-5:]) / 5 < 1.5


def test_loss_falls(shards: TokenShards) -> None:
    found = losses(train(shards, num_steps=30, optimizer=Muon(lr=5e-3)))
    assert sum(found[-5:]) / 5 < 0.7 * found[0]


def test_bf16_is_close_to_fp32_and_keeps_fp32_weights(shards: TokenShards) -> None:
    trainer = trainer_of(shards, precision="bf16", num_steps=3)
    found = list(trainer.steps())
    assert_finite(found, 3)
    assert losses(found) == pytest.approx(losses(train(shards, num_steps=3)), rel=0.02)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("state_init", [ZeroState(), NormalState()])
@pytest.mark.parametrize("loops", [FixedLoops(mean_loops=3), PER_SEQUENCE], ids=name_of)
def test_checkpointed_loops_change_nothing(
    shards: TokenShards, loops: Any, state_init: Any
) -> None:
    model = replace(MODEL, state_init=state_init)
    plain = train(shards, model, num_steps=4, loops=loops)
    spared = train(shards, model, num_steps=4, loops=loops, checkpoint_loops=True)
    assert losses(spared) == pytest.approx(losses(plain), rel=1e-6)
    wanted = [metric.max_violation for metric in plain]
    assert [metric.max_violation for metric in spared] == wanted


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layers_train(
    shards: TokenShards, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Code generation takes half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    model = replace(MODEL, recurrent_feed_forward=tiny(SwiGLU))
    compiled = train(shards, model, compile=True)
    assert losses(compiled) == pytest.approx(losses(train(shards, model)), rel=1e-4)


def test_the_cost_of_halting_joins_after_a_share_of_the_steps(shards: TokenShards) -> None:
    model = replace(MODEL, halting=ACT(ponder_weight=0.5))
    steps = train(shards, model, num_steps=4, ponder_from=0.5)
    costs = [step.total_loss - step.loss for step in steps]
    assert costs[:2] == pytest.approx([0.0, 0.0], abs=1e-3)  # the routers' cost
    wanted = [0.5 * step.ponder_cost for step in steps[2:]]
    assert costs[2:] == pytest.approx(wanted, rel=1e-3) and min(wanted) > 0.5


def test_act_by_one_line_of_config(shards: TokenShards) -> None:
    config = apply_overrides(RunConfig(model=MODEL, train=TRAIN), ["model.halting=act"])
    assert isinstance(config.model.halting, ACT)
    found = train(shards, config.model, num_steps=3, loops=FixedLoops(mean_loops=4))
    assert_finite(found, 3)
    assert all(1 < metric.ponder_cost <= 5 for metric in found)
    assert all(metric.total_loss > metric.loss for metric in found)


CHOICES = [
    {field: choice}
    for field, union in {
        "loops": LoopSampling,
        "curriculum": LoopCurriculum,
        "loss": Loss,
        "optimizer": Optimizer,
        "schedule": Schedule,
        "halting": Halting,
        "injection": Injection,
    }.items()
    for choice in members(union)
]
CHOICES[CHOICES.index({"loss": ExpectedLoss()})] |= {"halting": ExitGate()}


@pytest.mark.parametrize(
    "choice", CHOICES, ids=lambda c: "-".join(f"{k}={v.kind}" for k, v in c.items())
)
def test_every_choice_trains(shards: TokenShards, choice: dict[str, Any]) -> None:
    parts = {name: value for name, value in choice.items() if hasattr(MODEL, name)}
    model = tiny_config(vocab_size=257, context=SEQ, **parts)
    changes = {name: value for name, value in choice.items() if name not in parts}
    assert_finite(train(shards, model, **({"loops": PER_SEQUENCE} | changes)))


@pytest.mark.parametrize(
    ("sampling", "per"),
    [(PoissonLoops, "batch"), *((kind, "sequence") for kind in get_args(LoopSampling))],
)
def test_loops_of_a_step_follow_from_seed_and_step(
    shards: TokenShards, sampling: Any, per: Any
) -> None:
    first = train(shards, loops=sampling(per=per))
    again = train(shards, loops=sampling(per=per))
    assert [m.mean_loops for m in first] == [m.mean_loops for m in again]
    assert losses(first) == losses(again)
    if per == "batch":
        assert all(m.mean_loops == round(m.mean_loops) for m in first)


def test_seeds_differ(shards: TokenShards) -> None:
    assert losses(train(shards, seed=0)) != losses(train(shards, seed=1))


def test_global_generator_decides_nothing(shards: TokenShards) -> None:
    model = replace(MODEL, state_init=NormalState())
    torch.manual_seed(1)
    first = losses(train(shards, model))
    torch.manual_seed(2)
    assert losses(train(shards, model)) == first


def test_backprop_loops_cut_the_gradient_not_the_loss(shards: TokenShards) -> None:
    loops = FixedLoops(mean_loops=4)
    full = train(shards, loops=loops)[0]
    cut = train(shards, loops=loops, backprop_loops=1)[0]
    assert cut.loss == pytest.approx(full.loss, rel=1e-6)
    assert cut.gradient_norm != pytest.approx(full.gradient_norm, rel=1e-3)


def test_masked_documents_are_each_on_their_own(shards: TokenShards) -> None:
    """A row of two documents counts what the two say alone."""
    trainer = trainer_of(shards, mask_documents=True)
    assert_finite(list(trainer.steps()))
    trainer = trainer_of(shards, mask_documents=True)
    batches = (trainer.source.batch(step) for step in range(20))
    batch = next(batch for batch in batches if int(batch.documents.max()) > 0)
    trainer.model.train()
    parts, *_ = trainer._backward(batch, torch.full((BATCH,), 2))
    losses_alone: list[torch.Tensor] = []
    for tokens, targets, documents in zip(
        batch.tokens, batch.targets, batch.documents, strict=True
    ):
        for number in documents.unique():
            inside = documents == number
            logits = trainer.model(tokens[inside][None], num_loops=2).logits[0]
            # The next document's start token is the last target: where this one ends.
            loss = torch.nn.functional.cross_entropy(logits, targets[inside], reduction="none")
            losses_alone.append(loss)
    torch.testing.assert_close(parts.cross_entropy, torch.cat(losses_alone).mean())


def test_metrics_say_what_a_step_did(shards: TokenShards) -> None:
    first, second = train(shards, loops=FixedLoops(mean_loops=3))
    assert (first.step, second.step) == (0, 1)
    assert first.tokens == BATCH * SEQ
    assert first.mean_loops == 3
    assert first.tokens_per_second > 0
    assert 0 < first.max_decay < 1
    assert first.balance >= 0.99
    assert (first.lr_scale, second.lr_scale) == pytest.approx((1.0, 0.05))


def test_steps_go_on_where_they_stopped(shards: TokenShards) -> None:
    trainer = trainer_of(shards, num_steps=4)
    steps = trainer.steps()
    first = [next(steps), next(steps)]
    steps.close()  # type: ignore[attr-defined]
    found = first + list(trainer.steps())
    assert losses(found) == losses(train(shards, num_steps=4))


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    shards: TokenShards, where: str
) -> None:
    trainer = trainer_of(shards, num_steps=3)
    steps = trainer.steps()
    assert next(steps).skipped == 0
    before = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    state = {name: x.clone() for name, x in trainer.optimizers.tensors().items()}
    weight = trainer.model.norm.weight
    if where == "gradient":
        handle = weight.register_hook(lambda gradient: gradient * float("nan"))
    else:
        handle = trainer.model.norm.register_forward_hook(
            lambda *arguments: arguments[2] * float("nan")
        )
    metrics = next(steps)
    handle.remove()
    assert metrics.skipped == 1
    assert (metrics.loss == metrics.loss) == (where == "gradient")
    for name, x in trainer.model.state_dict().items():
        assert torch.equal(x, before[name]), name
    for name, x in trainer.optimizers.tensors().items():
        assert torch.equal(x, state[name]), name
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    after = next(steps)
    assert after.skipped == 1
    assert after.loss == after.loss
    assert not torch.equal(weight, before["norm.weight"])


def test_sizes_of_the_states_are_those_of_the_loops(shards: TokenShards) -> None:
    trainer = trainer_of(shards, loops=PER_SEQUENCE, micro_batch_size=2, num_steps=1)
    model, batch = OpenMythos(MODEL, seed=0).train(), trainer.source.batch(0)
    (metrics,) = trainer.steps()
    loops = sample_loops(
        PER_SEQUENCE, NoCurriculum(), batch=BATCH, seed=TRAIN.seed, step=0, num_steps=1
    )
    assert len(metrics.state_rms) == len(metrics.residual) == int(loops.max())
    with torch.no_grad():
        output = model(batch.tokens, num_loops=4, collect_loops=(1, 2, 3, 4))
    found = [*output.recurrence.states.values()]
    states = [torch.zeros_like(found[0]), *found]
    for loop, (rms, residual) in enumerate(
        zip(metrics.state_rms, metrics.residual, strict=True), start=1
    ):
        before, after = (states[n][loops >= loop] for n in (loop - 1, loop))
        assert rms == pytest.approx(float(after.square().mean().sqrt()), rel=1e-5)
        change = (after - before).norm(dim=-1) / after.norm(dim=-1)
        assert residual == pytest.approx(float(change.mean()), rel=1e-5)
    assert metrics.residual[0] == pytest.approx(1.0)


def test_sizes_are_looked_at_where_they_are_logged(shards: TokenShards) -> None:
    found = train(shards, num_steps=4, log_every=2)
    assert [len(metrics.state_rms) for metrics in found] == [2, 0, 2, 2]


def test_flops_of_a_step_are_those_of_its_loops(shards: TokenShards) -> None:
    trainer = trainer_of(shards, backprop_loops=2)
    wanted = sum(cost.Flops(MODEL, SEQ).training(n, 2) for n in (1, 2, 5))
    assert trainer._flops_per_token(torch.tensor([1, 2, 5])) == pytest.approx(wanted, rel=1e-6)
    assert 0 < next(trainer.steps()).mfu <= 1


def test_mfu_is_of_the_best_that_the_process_has_seen(
    shards: TokenShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peak that was measured on a busy machine is raised by a faster step."""
    asked: list[torch.dtype] = []

    def peak(_device: torch.device, dtype: torch.dtype) -> float:
        asked.append(dtype)
        return 8.0

    monkeypatch.setattr(trainer_module, "matmul_peak", peak)
    monkeypatch.setattr(trainer_module, "bf16_is_native", lambda _device: False)
    trainer = trainer_of(shards)
    assert [trainer._mfu(rate) for rate in (2.0, 16.0, 4.0, 16.0)] == [0.25, 1.0, 0.25, 1.0]
    assert asked == [torch.float32]
    trainer_of(shards, precision="bf16")._mfu(1.0)
    assert asked[1:] == [torch.float32, torch.bfloat16]  # emulated: much of a step is fp32
    monkeypatch.setattr(trainer_module, "bf16_is_native", lambda _device: True)
    trainer_of(shards, precision="bf16")._mfu(1.0)
    assert asked[3:] == [torch.bfloat16]


@pytest.mark.parametrize(
    ("last", "spike"), [(3.8, False), (2.0, False), (4.0, True), (float("nan"), False)]
)
def test_a_spike_stands_out_of_the_losses_before_it(last: float, spike: bool) -> None:
    rule = Rollback(window=5, deviations=6.0)
    calm = (3.0, 3.1, 2.9, 3.2, 2.8)  # median 3, median absolute deviation 0.1
    assert rule.is_spike(calm, last) == spike
    assert not rule.is_spike(calm[1:], last)
    assert not NoSpikes().is_spike(calm, last)
