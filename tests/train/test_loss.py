"""The loss against sums done by hand."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import random_tokens, tiny, tiny_config, tiny_model

from openmythos.config import ConfigError
from openmythos.kernels.cross_entropy import IGNORE
from openmythos.model.mythos import OpenMythos
from openmythos.model.outputs import MythosLosses
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.moe import MoE
from openmythos.recurrence.halting import ACT, ACTHalting, ExitGate
from openmythos.train.config import RunConfig, TrainConfig
from openmythos.train.loss import DeepSupervision, ExpectedLoss, FinalLoss, training_loss

BATCH = 4
TOKENS, TARGETS = random_tokens(BATCH, seed=1), random_tokens(BATCH, seed=2)
LOOPS = torch.tensor([2, 4, 1, 3])


def run(model: OpenMythos, num_loops: Any, loss: Any) -> MythosLosses:
    model.train()
    return model.losses(TOKENS, TARGETS, num_loops=num_loops, collect_loops=loss.collect_loops)


def by_hand(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target), averaged over the targets that count."""
    log_p = logits.double().log_softmax(dim=-1)
    picked = log_p.gather(-1, targets.clamp_min(0)[..., None])[..., 0]
    return -picked[targets != IGNORE].mean()


def test_losses_are_those_of_the_logits() -> None:
    model = tiny_model(tiny_config())
    output = model(TOKENS, num_loops=LOOPS, collect_loops=(1, 3))
    losses = model.losses(TOKENS, TARGETS, num_loops=LOOPS, collect_loops=(1, 3))
    torch.testing.assert_close(
        losses.cross_entropy.double(), by_hand(output.logits, TARGETS), rtol=1e-5, atol=1e-5
    )
    order = output.recurrence.order
    assert order is not None
    for loss, logits in zip(losses.by_loop.values(), output.loop_logits.values(), strict=True):
        wanted = by_hand(logits, TARGETS[order][: len(logits)])
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="targets: has shape"):
        model.losses(TOKENS, TARGETS[:, 1:])


def test_final_loss_without_extras_is_cross_entropy_alone() -> None:
    model = tiny_model(tiny_config(recurrent_feed_forward=tiny(SwiGLU)))
    output = run(model, 3, FinalLoss())
    parts = training_loss(output, FinalLoss(), model)
    assert output.by_loop == {}
    assert torch.equal(parts.total, output.cross_entropy)
    assert float(parts.balance) == float(parts.z) == float(parts.ponder_cost) == 0


def test_deep_supervision_is_the_mean_over_loops() -> None:
    model = tiny_model(tiny_config(recurrent_feed_forward=tiny(SwiGLU)))
    loss = DeepSupervision(weight=0.7)
    parts = training_loss(run(model, 3, loss), loss, model)
    losses = [by_hand(model(TOKENS, num_loops=n).logits, TARGETS) for n in (1, 2, 3)]
    wanted = losses[-1] + 0.7 * sum(losses, torch.zeros(())) / 3
    torch.testing.assert_close(parts.total.double(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(parts.cross_entropy.double(), losses[-1], rtol=1e-5, atol=1e-5)


def test_deep_supervision_with_loops_per_sequence() -> None:
    model = tiny_model(tiny_config(recurrent_feed_forward=tiny(SwiGLU)))
    loss = DeepSupervision(weight=0.7)
    parts = training_loss(run(model, LOOPS, loss), loss, model)
    rows = {}  # logits of each row after each loop that it ran, row by row
    for row, depth in enumerate(LOOPS.tolist()):
        for loop in range(1, depth + 1):
            rows[row, loop] = model(TOKENS[row : row + 1], num_loops=loop).logits[0]
    means = []
    for loop in range(1, 5):
        running = [row for row, depth in enumerate(LOOPS.tolist()) if depth >= loop]
        logits = torch.stack([rows[row, loop] for row in running])
        means.append(by_hand(logits, TARGETS[running]))
    last = torch.stack([rows[row, depth] for row, depth in enumerate(LOOPS.tolist())])
    wanted = by_hand(last, TARGETS) + 0.7 * torch.stack(means).mean()
    torch.testing.assert_close(parts.total.double(), wanted, rtol=1e-5, atol=1e-5)


def test_router_costs_enter_the_total_by_their_weights() -> None:
    moe = tiny(MoE, balance_weight=0.3, z_weight=0.2)
    model = tiny_model(tiny_config(feed_forward=tiny(SwiGLU), recurrent_feed_forward=moe))
    output = run(model, 2, FinalLoss())
    (stats,) = output.router.values()
    parts = training_loss(output, FinalLoss(), model)
    assert float(stats.tokens) == 2 * TOKENS.numel()  # both loops
    assert float(stats.sequences) == 2 * BATCH
    balance, z = stats.balance / stats.sequences, stats.z / stats.tokens
    torch.testing.assert_close(parts.balance, balance)
    torch.testing.assert_close(parts.z, z)
    torch.testing.assert_close(parts.total, parts.cross_entropy + 0.3 * balance + 0.2 * z)


def test_layers_inside_and_outside_the_loop_have_their_own_weights() -> None:
    inner, outer = tiny(MoE, balance_weight=0.3), tiny(MoE, balance_weight=0.1, z_weight=0.5)
    model = tiny_model(tiny_config(feed_forward=outer, recurrent_feed_forward=inner))
    output = run(model, 2, FinalLoss())
    parts = training_loss(output, FinalLoss(), model)
    assert set(output.router) == {"prelude.0", "recurrent.layers.0", "coda.0"}
    wanted = parts.cross_entropy
    for name, stats in output.router.items():
        moe = inner if name.startswith("recurrent") else outer
        wanted = wanted + moe.balance_weight * stats.balance / stats.sequences
        wanted = wanted + moe.z_weight * stats.z / stats.tokens
    torch.testing.assert_close(parts.total, wanted)


def test_perfect_balance_costs_one() -> None:
    moe = tiny(MoE, num_experts=4, top_k=4)
    model = tiny_model(tiny_config(feed_forward=tiny(SwiGLU), recurrent_feed_forward=moe))
    parts = training_loss(run(model, 2, FinalLoss()), FinalLoss(), model)
    torch.testing.assert_close(parts.balance, torch.ones(()))


def test_ponder_cost_enters_by_its_weight() -> None:
    config = tiny_config(
        recurrent_feed_forward=tiny(SwiGLU), halting=ACT(ponder_weight=0.25, bias_init=-0.5)
    )
    model = tiny_model(config)
    output = run(model, 3, FinalLoss())
    parts = training_loss(output, FinalLoss(), model)
    assert output.recurrence.ponder_cost is not None
    assert float(parts.ponder_cost.detach()) > 1
    torch.testing.assert_close(parts.ponder_cost, output.recurrence.ponder_cost)
    torch.testing.assert_close(parts.total, parts.cross_entropy + 0.25 * parts.ponder_cost)
    early = training_loss(output, FinalLoss(), model, pondering=False)
    assert torch.equal(early.total, parts.cross_entropy)
    assert torch.equal(early.ponder_cost, parts.ponder_cost)  # still reported
    assert isinstance(model.recurrent.halting, ACTHalting)
    model.recurrent.halting.config = ACT(ponder_weight=0.0, bias_init=-0.5)
    parts = training_loss(output, FinalLoss(), model)
    assert torch.equal(parts.total, parts.cross_entropy)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan")])
def test_deep_supervision_wants_a_positive_weight(weight: float) -> None:
    with pytest.raises(ValueError, match="weight = "):
        DeepSupervision(weight=weight)


@pytest.mark.parametrize("prior", [0.0, 0.3])
@pytest.mark.parametrize("loops", [3, LOOPS], ids=["batch", "sequence"])
def test_the_expected_loss_weighs_every_loop_by_its_exit_probability(
    prior: float, loops: Any
) -> None:
    gate = ExitGate(prior=prior, prior_weight=0.2)
    model = tiny_model(tiny_config(recurrent_feed_forward=tiny(SwiGLU), halting=gate)).train()
    with torch.no_grad():
        model.recurrent.halting.weight.normal_()
    losses = model.losses(TOKENS, TARGETS, num_loops=loops, collect_loops="all", by_halting=True)
    parts = training_loss(losses, ExpectedLoss(), model)
    wanted, divergence, count = torch.zeros((), dtype=torch.double), 0.0, 0
    for row, depth in enumerate(torch.as_tensor(loops).expand(BATCH).tolist()):
        one = TOKENS[row : row + 1]
        out = model(one, num_loops=depth, collect_loops="all")
        left = torch.ones(one.shape, dtype=torch.double)
        for loop in range(1, depth + 1):
            state = out.recurrence.states[loop].double()
            unit = model.recurrent.halting
            chance = (state @ unit.weight.double() + unit.bias.double()).sigmoid()
            p = left if loop == depth else left * chance
            left = left - p
            log_prior = 0.0 if prior == 0 else math.log(prior) + (loop - 1) * math.log(1 - prior)
            divergence = divergence + (p * (p.log() - log_prior)).sum()
            targets = TARGETS[row : row + 1]
            each = torch.nn.functional.cross_entropy(
                out.loop_logits[loop].double().flatten(0, 1), targets.flatten(), reduction="none"
            )
            wanted = wanted + (p.flatten() * each)[targets.flatten() != IGNORE].sum()
        count += int((TARGETS[row] != IGNORE).sum())
    wanted = wanted / count + 0.2 * divergence / TOKENS.numel()
    torch.testing.assert_close(parts.total.double(), wanted, rtol=1e-4, atol=1e-5)
    parts.total.backward()
    assert model.recurrent.halting.weight.grad.any()


def test_the_expected_loss_wants_halting() -> None:
    with pytest.raises(ConfigError, match=r"loss.kind = 'expected': must be \"final\""):
        ExpectedLoss().check(tiny_config())
    with pytest.raises(ConfigError, match=r"train.loss.kind = 'expected': must be"):
        RunConfig(model=tiny_config(context=256), train=TrainConfig(loss=ExpectedLoss()))
