"""Exit rules: each criterion by its definition, patience, minimum, scopes, and what exits save."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from variants import (
    EXIT_RULES,
    SEQ,
    VOCAB,
    active_positions,
    members,
    name_of,
    random_tokens,
    tiny_config,
    tiny_model,
)

from openmythos.config import ConfigError
from openmythos.inference.generation import Request, stream
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.exit_rules import (
    ArgmaxExit,
    EarlyExit,
    ExitRule,
    ExitTracker,
    FixedExit,
    KLEntropyExit,
    KLExit,
    LoopStates,
    LoopView,
    StateChangeExit,
)
from openmythos.recurrence.halting import ACT, Halting, NoHalting

ALL_RULES = members(ExitRule)
RULES = [rule for rule in ALL_RULES if not isinstance(rule, FixedExit)]
LOOPS = 8


def view(state: Tensor, previous: Tensor, logits: Tensor, previous_logits: Tensor) -> LoopView:
    return LoopView(previous, state, previous_logits, logits)


def test_criteria_by_their_definitions() -> None:
    previous, state = torch.randn(2, 2, 3, 5)
    state = previous + 0.1 * state
    before, after = torch.randn(2, 2, 3, 7)
    after = before + 0.2 * after
    change = (state - previous).norm(dim=-1) / state.norm(dim=-1)
    p, q = after.softmax(-1), before.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    entropy = -(p * p.log()).sum(-1)
    same = after.argmax(-1) == before.argmax(-1)
    seen = view(state, previous, after, before)

    def middle(x: Tensor) -> float:
        return float(x.median()) + 1e-6

    cases = [
        (StateChangeExit(threshold=middle(change)), change < middle(change)),
        (KLExit(threshold=middle(kl)), kl < middle(kl)),
        (KLEntropyExit(threshold=middle(kl), max_entropy=9.0), kl < middle(kl)),
        (KLEntropyExit(threshold=9.0, max_entropy=middle(entropy)), entropy < middle(entropy)),
        (ArgmaxExit(), same),
        (FixedExit(), torch.zeros(2, 3, dtype=torch.bool)),
    ]
    assert {type(rule) for rule, _ in cases} == {type(rule) for rule in ALL_RULES}
    for rule, expected in cases:
        assert torch.equal(rule.converged(seen), expected), rule
        assert isinstance(rule, FixedExit) or expected.any(), rule


def leave_by_hand(rule: ExitRule, stays: Tensor, not_before: Tensor | None = None) -> Tensor:
    """The loop in which each position leaves (0: never); stays [loops, batch, seq] says if it may.

    The rule is the argmax one, driven by logits that repeat or change.
    """
    loops, batch, seq = stays.shape
    tokens = torch.cat((torch.zeros(1, batch, seq), (~stays[1:]).long().cumsum(0)))
    logits = iter(torch.nn.functional.one_hot(tokens.long(), loops + 1).float())
    tracker = ExitTracker(
        rule, lambda *_: next(logits), torch.ones(batch, seq, dtype=torch.bool), not_before
    )
    state, left = torch.zeros(batch, seq, 1), torch.zeros(batch, seq, dtype=torch.long)
    active = torch.ones(batch, seq, dtype=torch.bool)
    for loop in range(loops):
        active = tracker.update(LoopStates(state, state, state), active, loop)
        left = torch.where(~active & (left == 0), loop + 1, left)
    return left


def at(*rows: str) -> Tensor:
    """One string per position, one character per loop ("x": the criterion holds)."""
    return torch.tensor([[c == "x" for c in row] for row in rows]).T[:, None]


def test_patience_counts_loops_in_a_row() -> None:
    stays = at(".xxxxx", ".x.xxx", "..x.x.", ".xx.xx")
    for patience, expected in ((1, [2, 2, 3, 2]), (2, [3, 5, 0, 3]), (3, [4, 6, 0, 0])):
        left = leave_by_hand(ArgmaxExit(patience=patience), stays)
        assert left[0].tolist() == expected


def test_nothing_leaves_before_min_loops() -> None:
    stays = at(".xxxxx", ".xx...", "....xx")
    left = leave_by_hand(ArgmaxExit(patience=1, min_loops=4), stays)
    assert left[0].tolist() == [4, 0, 5]


def test_prefix_scope_waits_for_all_earlier_positions() -> None:
    stays = at(".xxxxx", "...xxx", ".xxxxx", "....xx", ".xxxxx")
    left = leave_by_hand(ArgmaxExit(patience=1), stays)
    assert left[0].tolist() == [2, 4, 2, 5, 2]
    left = leave_by_hand(ArgmaxExit(patience=1, scope="prefix"), stays)
    assert left[0].tolist() == [2, 4, 4, 5, 5]


def test_prefix_scope_goes_on_where_the_cached_tokens_left() -> None:
    stays = at(".xxxxx", "...xxx")
    for last, expected in ((1, [2, 4]), (3, [3, 4]), (5, [5, 5])):
        rule = ArgmaxExit(patience=1, scope="prefix")
        left = leave_by_hand(rule, stays, torch.tensor([last]))
        assert left[0].tolist() == expected


def test_prefix_scope_does_not_wait_for_padding() -> None:
    model, rule = tiny_model(tiny_config()), StateChangeExit(threshold=0.12, scope="prefix")
    tokens = random_tokens(6)
    mask = (torch.arange(SEQ) >= 4).expand(6, SEQ)
    with torch.no_grad():
        padded = model(tokens, num_loops=LOOPS, attention_mask=mask, exit_rule=rule)
        alone = model(tokens[:, 4:], num_loops=LOOPS, exit_rule=rule)
    used = alone.recurrence.loops_used
    assert used.min() < LOOPS and len(used.unique()) > 1
    assert torch.equal(padded.recurrence.loops_used[:, 4:], used)


def states_and_logits(model: OpenMythos, tokens: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    out = model(tokens, num_loops=LOOPS, collect_loops=range(1, LOOPS + 1))
    return [*out.recurrence.states.values()], [*out.loop_logits.values()]


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@torch.no_grad()
def test_the_first_position_leaves_where_its_trajectory_says(rule: ExitRule) -> None:
    """The first token depends on no other, so its loops can be judged in hindsight."""
    model, tokens = tiny_model(tiny_config()), random_tokens(8)
    states, logits = states_and_logits(model, tokens)
    states = [torch.zeros_like(states[0]), *states]
    expected = torch.full((8,), LOOPS)
    streak = torch.zeros(8, dtype=torch.long)
    for loop, (previous, state) in enumerate(pairwise(states)):
        if rule.needs_logits and loop == 0:
            continue
        stays = rule.converged(LoopView(previous, state, logits[loop - 1], logits[loop]))[:, 0]
        streak = torch.where(stays, streak + 1, 0)
        leaves = (streak >= rule.patience) & (expected == LOOPS)
        expected = torch.where(leaves, loop + 1, expected)
    out = model(tokens, num_loops=LOOPS, exit_rule=rule)
    assert out.recurrence.loops_used[:, 0].tolist() == expected.tolist()
    assert expected.min() < LOOPS
    # Its output is what the model says after that many loops.
    for row, loop in enumerate(expected.tolist()):
        torch.testing.assert_close(out.logits[row, 0], logits[loop - 1][row, 0])


@pytest.mark.parametrize("rule", EXIT_RULES, ids=name_of)
@torch.no_grad()
def test_positions_that_left_stand_still_and_cost_no_feed_forward(rule: ExitRule) -> None:
    model, fed = tiny_model(tiny_config()), []
    model.recurrent.layers[0].feed_forward.register_forward_pre_hook(
        lambda _, args: fed.append(active_positions(*args))
    )
    out = model(
        random_tokens(3), num_loops=LOOPS, exit_rule=rule, collect_loops=range(1, LOOPS + 1)
    )
    used, states = out.recurrence.loops_used, [*out.recurrence.states.values()]
    assert fed == [int((used > loop).sum()) for loop in range(int(used.max()))]
    for loop in range(1, len(states)):
        assert torch.equal(states[loop][used <= loop], states[loop - 1][used <= loop])
    assert torch.equal(out.recurrence.state, states[-1])
    assert out.logits.shape == (3, SEQ, VOCAB)


@torch.no_grad()
def test_a_prefix_never_leaves_after_a_later_position() -> None:
    model = tiny_model(tiny_config(halting=NoHalting()))
    for rule in EXIT_RULES:
        out = model(random_tokens(4), num_loops=LOOPS, exit_rule=rule)
        monotone = (out.recurrence.loops_used.diff(dim=1) >= 0).all()
        assert monotone or getattr(rule, "scope", "prefix") == "token"


@torch.no_grad()
def test_the_fixed_rule_is_no_rule() -> None:
    model, tokens = tiny_model(tiny_config()), random_tokens(2)
    fixed = model(tokens, num_loops=3, exit_rule=FixedExit())
    assert torch.equal(fixed.logits, model(tokens, num_loops=3).logits)
    assert (fixed.recurrence.loops_used == 3).all()


@torch.no_grad()
def test_generation_reports_and_saves_loops() -> None:
    model, prompt = tiny_model(tiny_config()), random_tokens(1, 6)
    for rule in RULES:
        steps = list(
            stream(model, prompt, Request(max_new_tokens=5, num_loops=LOOPS, exit_rule=rule))
        )
        loops = torch.cat([step.loops_used for step in steps])
        assert loops.min() >= 1 and loops.max() <= LOOPS
        assert loops.float().mean() < LOOPS, rule


def test_exit_rules_are_for_inference() -> None:
    model = tiny_model(tiny_config()).train()
    with pytest.raises(ValueError, match=r"exit_rule: is for inference; call model\.eval\(\)"):
        model(random_tokens(1), exit_rule=StateChangeExit())


@pytest.mark.parametrize("rule", RULES, ids=name_of)
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"min_loops": 0}, "min_loops = 0: must be an integer, at least 1"),
        ({"patience": 0}, "patience = 0: must be an integer, at least 1"),
        ({"threshold": 0.0}, r"threshold = 0\.0: must be a number, above 0"),
        ({"max_entropy": -1.0}, r"max_entropy = -1\.0: must be a number, above 0"),
        ({"threshold": math.nan}, "threshold = nan: must be a number"),
    ],
)
def test_impossible_settings_are_refused(
    rule: ExitRule, fields: dict[str, float], message: str
) -> None:
    if not all(hasattr(rule, name) for name in fields):
        return
    with pytest.raises(ConfigError, match=message):
        replace(rule, **fields)


def test_rules_are_what_the_interface_says() -> None:
    assert all(isinstance(rule, EarlyExit) == (rule.kind != "fixed") for rule in members(ExitRule))


@pytest.mark.parametrize("rule", [r for r in EXIT_RULES if r.kind != "fixed"], ids=name_of)
@pytest.mark.parametrize("halting", [NoHalting(), ACT(threshold=0.9, bias_init=-4.0)], ids=name_of)
@torch.no_grad()
def test_a_sequence_freezes_nothing(rule: ExitRule, halting: Halting) -> None:
    """Every output is that of a pass without a rule of as many loops as the position used."""
    sequence = replace(rule, scope="sequence")
    model = tiny_model(tiny_config(halting=halting, coda_layers=0), scale=0.15)
    tokens = random_tokens(3)
    out = model(tokens, num_loops=LOOPS, exit_rule=sequence)
    used = out.recurrence.loops_used
    assert used.unique().numel() > 1
    fixed = {n: model(tokens, num_loops=n).logits for n in used.unique().tolist()}
    for row, column in torch.cartesian_prod(*map(torch.arange, used.shape)).tolist():
        logits = fixed[int(used[row, column])][row, column]
        torch.testing.assert_close(out.logits[row, column], logits, atol=1e-5, rtol=1e-5)
    if isinstance(halting, NoHalting):
        assert bool((used.diff(dim=1) >= 0).all())  # no position exits before an earlier one
        alone = model(tokens, num_loops=LOOPS, exit_rule=replace(rule, scope="token"))
        assert torch.equal(alone.recurrence.loops_used[:, 0], used[:, 0])


@torch.no_grad()
def test_padding_does_not_hold_up_a_sequence() -> None:
    model, rule = tiny_model(tiny_config(), scale=0.15), KLExit(threshold=2e-3, scope="sequence")
    tokens = random_tokens(1)
    mask = torch.tensor([[False] * 3 + [True] * SEQ])
    padded = torch.cat((tokens.new_zeros(1, 3), tokens), dim=1)
    alone = model(tokens, num_loops=LOOPS, exit_rule=rule)
    beside = model(padded, num_loops=LOOPS, attention_mask=mask, exit_rule=rule)
    assert torch.equal(alone.recurrence.loops_used, beside.recurrence.loops_used[:, 3:])
    torch.testing.assert_close(alone.logits, beside.logits[:, 3:], atol=1e-5, rtol=1e-5)
