"""The engine's promise: whoever shares the batch, a request gets what it gets alone."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from variants import VOCAB, members, name_of, tiny, tiny_config, tiny_model, variations

from openmythos import kernels
from openmythos.config import ConfigError
from openmythos.inference.contrast import LoopContrast
from openmythos.inference.engine import Engine
from openmythos.inference.generation import Request, stream
from openmythos.inference.request import (
    Draft,
    EngineLimits,
    EngineRequest,
    Event,
    Finished,
    NewToken,
    PromptScored,
)
from openmythos.inference.sampling import Sampling
from openmythos.model.mythos import OpenMythos
from openmythos.model.stages import Stages
from openmythos.nn.block import Attention
from openmythos.nn.cache import ExactCache, FirstLoopCache, GroupedLoopCache, LastLoopCache
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.moe import MoE
from openmythos.recurrence.exit_rules import (
    ArgmaxExit,
    FixedExit,
    KLEntropyExit,
    KLExit,
    StateChangeExit,
)
from openmythos.recurrence.halting import ExitGate, Halting
from openmythos.recurrence.initial_state import StateInit
from openmythos.recurrence.loop_embedding import LoopEmbedding, NoLoopEmbedding
from openmythos.recurrence.loop_lora import LoopLoRA

SCOPES = st.sampled_from(["token", "prefix", "sequence"])
POLICIES = [ExactCache(), FirstLoopCache(), LastLoopCache(), GroupedLoopCache(group=2)]
RULES = st.one_of(
    st.just(FixedExit()),
    st.builds(
        StateChangeExit,
        threshold=st.sampled_from([0.05, 0.12, 0.3]),
        min_loops=st.integers(1, 2),
        scope=SCOPES,
    ),
    st.builds(
        KLExit,
        threshold=st.sampled_from([2e-3, 0.05, 0.5]),
        patience=st.integers(1, 2),
        scope=SCOPES,
    ),
    st.builds(KLEntropyExit, threshold=st.just(0.05), max_entropy=st.just(3.7), scope=SCOPES),
    st.builds(ArgmaxExit, patience=st.integers(1, 2), scope=SCOPES),
)
TOKEN = st.integers(0, VOCAB - 1)


@st.composite
def asked(draw: st.DrawFn) -> EngineRequest:
    policy = draw(st.sampled_from([POLICIES[0], *POLICIES]))
    options = Request(
        max_new_tokens=draw(st.sampled_from([6, 0, 1, 3, 14])),
        num_loops=draw(st.sampled_from([2, 1, 3, 5, 8])),
        exit_rule=draw(RULES),
        prefill=policy,
        decode=draw(st.sampled_from([policy, policy, *POLICIES])),
        stop_ids=tuple(draw(st.lists(TOKEN, max_size=3))),
        sampling=Sampling(
            temperature=draw(st.sampled_from([0.0, 1.0])),
            top_k=draw(st.sampled_from([0, 9])),
            top_p=draw(st.sampled_from([1.0, 0.9])),
            seed=draw(st.integers(0, 99)),
        ),
    )
    return EngineRequest(
        prompt=tuple(draw(st.lists(TOKEN, min_size=1, max_size=20))),
        options=options,
        n=draw(st.sampled_from([1, 1, 3])),
        draft=draw(drafts(options)),
    )


def drafts(options: Request) -> st.SearchStrategy[Draft | None]:
    """Drafts that a request can have."""
    exact = options.prefill == options.decode and options.prefill in POLICIES[:2]
    if not exact or options.num_loops == 1 or not isinstance(options.exit_rule, FixedExit):
        return st.none()
    loops = st.integers(1, options.num_loops - 1)
    return st.one_of(st.none(), st.builds(Draft, loops=loops, tokens=st.integers(1, 5)))


MODELS = st.builds(
    lambda **parts: tiny_model(tiny_config(**parts, context=64), scale=0.3).double(),
    attention=st.sampled_from(variations(Attention)),
    halting=st.sampled_from([*members(Halting), ExitGate(threshold=0.6, readout="freeze")]),
    loop_embedding=st.sampled_from([NoLoopEmbedding(), LoopEmbedding(num_loops=3)]),
    recurrent_feed_forward=st.sampled_from([tiny(MoE), tiny(MoE, bias_loops=2)]),
    recurrent_layers=st.integers(1, 2),
    coda_layers=st.integers(0, 2),
    prelude_layers=st.integers(0, 1),
    state_init=st.sampled_from(members(StateInit)),
)
LIMITS = st.builds(
    EngineLimits,
    max_rows=st.sampled_from([4, 1, 2, 8]),
    pages=st.sampled_from([120, 40, 80]),
    page_tokens=st.sampled_from([2, 4, 8]),
    prefill_budget=st.sampled_from([64, 4, 16]),
    boundary_wait=st.integers(1, 3),
    boundary_share=st.sampled_from([0.5, 0.0, 1.0]),
)


def alone(model: OpenMythos, request: EngineRequest, sample: int = 0) -> list[Any]:
    """(token, loops) of every step of `stream`, and why it ended."""
    sampling = request.options.sampling
    sampling = replace(sampling, seed=sampling.seed + sample)
    options = replace(request.options, sampling=sampling)
    steps = list(stream(model, torch.tensor([request.prompt]), options))
    found: list[Any] = [(int(step.tokens[0]), int(step.loops_used[0])) for step in steps]
    stopped = bool(found) and found[-1][0] in options.stop_ids
    return [*found, "stop" if stopped else "length"]


def answers(events: Sequence[Event], request: int, sample: int = 0) -> list[Any]:
    """The same from the engine's events."""
    found: list[Any] = []
    for event in events:
        if isinstance(event, PromptScored) or (event.request, event.sample) != (request, sample):
            continue
        if isinstance(event, NewToken):
            found.append((event.token, event.loops))
        else:
            assert event.new_tokens == len(found)
            found.append(event.reason)
    return found


def check_pages(engine: Engine) -> None:
    """Every page is free, or held by as many rows as the ledger says."""
    ledger, held = engine._scheduler.ledger, [0] * (engine.limits.pages + 1)
    for row in engine._scheduler.running:
        for block in row.blocks:
            for page in block:
                held[page] += 1
    assert held == ledger._holders
    assert ledger.free == sum(count == 0 for count in held[1:])


CASES = given(
    model=MODELS,
    limits=LIMITS,
    requests=st.lists(asked(), min_size=1, max_size=6),
    arrivals=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    cancelled=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 5)), max_size=2),
    most_rows=st.sampled_from([0, 3, 64]),
)


def check_promise(
    model: OpenMythos,
    limits: EngineLimits,
    requests: list[EngineRequest],
    arrivals: list[int],
    cancelled: list[tuple[int, int]],
    most_rows: int,
) -> None:
    """`most_rows` > 0: short prompts are read as rows of one token, so many at a time."""
    engine, events, numbers = Engine(model, limits), [], {}
    waits = [(sum(arrivals[: i + 1]), request) for i, request in enumerate(requests)]
    with kernels.use("reference"), patch.object(Stages, "most_rows", most_rows):
        for step in range(4000):
            while waits and waits[0][0] <= step:
                request = waits.pop(0)[1]
                try:
                    numbers[engine.add(request)] = request
                except ConfigError as error:
                    refused = "draft = " if engine._runner.stages.halts else "pages = "
                    assert str(error).startswith(("pages = ", refused))
            for when, number in cancelled:
                if when == step:
                    engine.cancel(number)
            events += engine.step()
            check_pages(engine)
            if engine.idle and not waits:
                break
        stats = engine.stats()
        assert (stats.pages_used, stats.rows_running, stats.rows_waiting) == (0, 0, 0)
        for number, request in numbers.items():
            for sample in range(request.n):
                found, wanted = answers(events, number, sample), alone(model, request, sample)
                if found[-1] == "cancelled":
                    wanted = [*wanted[: len(found) - 1], "cancelled"]
                assert found == wanted


test_every_request_gets_what_it_gets_alone = settings(max_examples=6)(CASES(check_promise))
test_in_many_cases = pytest.mark.slow(settings(max_examples=300)(CASES(check_promise)))


def test_settings_that_an_engine_refuses() -> None:
    with pytest.raises(ConfigError, match=r"prompt = \(\): is empty"):
        EngineRequest(prompt=())
    with pytest.raises(ConfigError, match=r"contrast.kind = 'loops': must be none"):
        options = Request(sampling=Sampling(contrast=LoopContrast()))
        EngineRequest(prompt=(1,), options=options)
    with pytest.raises(ConfigError, match="latent_steps = 1"):
        EngineRequest(prompt=(1,), options=Request(latent_steps=1))
    engine = Engine(tiny_model(tiny_config()))
    with pytest.raises(ConfigError, match="prompt tokens = 20: and max_new_tokens = 9 exceed"):
        engine.add(EngineRequest(prompt=(1,) * 20, options=Request(max_new_tokens=9)))
    with pytest.raises(ConfigError, match="must hold token ids below 50"):
        engine.add(EngineRequest(prompt=(50,), options=Request(max_new_tokens=1)))
    assert engine.idle


def test_log_probabilities_are_those_of_a_forward_pass() -> None:
    model = tiny_model(tiny_config(), scale=0.3)
    request = EngineRequest(
        prompt=(3, 1, 4, 1, 5, 9, 2, 6),
        options=Request(max_new_tokens=4, num_loops=3, sampling=Sampling(temperature=1.0)),
        logprobs=2,
        prompt_logprobs=3,
    )
    for budget in (512, 9):  # in one chunk, and in chunks of 3
        scored, *events = Engine(model, EngineLimits(prefill_budget=budget)).run([request])
        assert isinstance(scored, PromptScored) and scored.loops == (3,) * 8
        new = [event for event in events if isinstance(event, NewToken)]
        ids = [*request.prompt, *(event.token for event in new)]
        with torch.no_grad():
            rows = model(torch.tensor([ids]), num_loops=3).logits[0].log_softmax(dim=-1)
        assert scored.logprobs[0] is None
        found = [*scored.logprobs[1:], *(event.logprobs for event in new)]
        for place, about in enumerate(found):
            assert about is not None
            assert about.logprob == pytest.approx(float(rows[place, ids[place + 1]]), abs=1e-4)
            top = rows[place].topk(3 if place < 7 else 2)
            assert [token for token, _ in about.top] == top.indices.tolist()
            assert [score for _, score in about.top] == pytest.approx(top.values.tolist(), abs=1e-4)


def test_not_finite_logits_end_their_request_alone() -> None:
    model = tiny_model(tiny_config(tie_embeddings=False), scale=0.3)
    good = EngineRequest(prompt=(1, 2), options=Request(max_new_tokens=5))
    bad = EngineRequest(prompt=(7, 7), options=Request(max_new_tokens=5))
    with torch.no_grad():
        model.embed.weight[7] = float("nan")
    engine = Engine(model)
    events = engine.run([good, bad])
    assert answers(events, 0) == alone(model, good)
    last = events[[isinstance(e, Finished) and e.request == 1 for e in events].index(True)]
    assert isinstance(last, Finished) and last.reason == "error" and "not finite" in last.message
    assert engine.stats().pages_used == 0


def test_an_exception_ends_the_rows_it_hits_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(tiny_config(), scale=0.3)
    engine = Engine(model)
    early = EngineRequest(prompt=(1, 2), options=Request(max_new_tokens=8))
    late = EngineRequest(prompt=(3, 4), options=Request(max_new_tokens=3, num_loops=2))
    engine.add(early)
    events = engine.step()
    with monkeypatch.context() as broken:
        broken.setattr(engine._reader, "prefill", lambda *_, **__: 1 / 0)
        engine.add(late)
        events += engine.step()
    assert answers(events, 1) == ["error"]
    while not engine.idle:
        events += engine.step()
    assert answers(events, 0) == alone(model, early)
    assert engine.stats().pages_used == 0


def test_shallow_requests_hold_fewer_pages() -> None:
    """One page per layer and loop: prelude, coda and one recurrent layer."""
    model, held = tiny_model(tiny_config(prelude_layers=1)), {}
    for loops in (2, 8):
        engine = Engine(model, EngineLimits(page_tokens=4))
        engine.add(EngineRequest(prompt=(1, 2), options=Request(max_new_tokens=2, num_loops=loops)))
        engine.step()
        held[loops] = engine.stats().pages_used
    assert held == {2: 2 + 2, 8: 2 + 8}


def test_samples_share_the_full_pages_of_their_prompt() -> None:
    model = tiny_model(tiny_config(prelude_layers=1))
    engine = Engine(model, EngineLimits(page_tokens=4))
    options = Request(max_new_tokens=3, num_loops=2, sampling=Sampling(temperature=1.0))
    engine.add(EngineRequest(prompt=(1,) * 9, options=options, n=3))
    engine.step()
    assert engine.stats().pages_used == 4 * (2 + 3)  # two full blocks, and one more each
    assert [row.phase for row in engine.rows()] == ["loop"] * 3


def test_drafts_save_passes_and_change_nothing() -> None:
    model = tiny_model(tiny_config(), scale=0.3)
    plain = EngineRequest(
        prompt=(1, 2, 3),
        options=Request(max_new_tokens=20, num_loops=4, sampling=Sampling(temperature=1.0, seed=5)),
    )
    drafted = replace(plain, draft=Draft(loops=3, tokens=3))
    engine = Engine(model)
    assert answers(engine.run([drafted]), 0) == alone(model, plain)
    stats = engine.stats()
    assert stats.drafted and 0 < stats.accepted < stats.drafted
    assert stats.boundaries < 20 and stats.pages_used == 0
    # With other rows in flight there are no drafts: they would cost more than they save.
    engine = Engine(model, EngineLimits(draft_rows=1))
    events = engine.run([drafted, replace(drafted, n=3)])
    assert engine.stats().drafted < stats.drafted
    assert [answers(events, 1, n) for n in range(3)] == [alone(model, plain, n) for n in range(3)]
    with pytest.raises(ConfigError, match=r"draft.loops = 4: must be an integer, at least 1 and"):
        replace(plain, draft=Draft(loops=4))
    sharing = replace(plain.options, prefill=LastLoopCache(), decode=LastLoopCache())
    with pytest.raises(ConfigError, match="needs the cache policies exact or first"):
        replace(drafted, options=sharing)


def other_attention(model: OpenMythos) -> None:
    """Other tensors in place of those of all attention layers."""
    new = tiny_model(model.config, seed=3, scale=0.3).state_dict()
    attention = {name: tensor for name, tensor in new.items() if "attention." in name}
    model.load_state_dict(model.state_dict() | attention, assign=True)


def hooked(model: OpenMythos) -> None:
    model.recurrent.layers[0].register_forward_hook(lambda _, __, out: (2 * out[0], out[1]))


@pytest.mark.parametrize("change", [None, other_attention, hooked])
@pytest.mark.parametrize("window", [0, 3])
def test_layers_that_are_arranged_once_give_what_modules_give(
    change: Callable[[OpenMythos], None] | None, window: int
) -> None:
    """With deltas and embeddings of loops, tables that grow, and changes between two steps."""
    config = tiny_config(
        attention=GroupedQueryAttention(num_heads=4, num_kv_heads=2, head_dim=8, window=window),
        recurrent_layers=2,
        loop_lora=LoopLoRA(rank=2, num_loops=3),
        loop_embedding=LoopEmbedding(num_loops=3),
    )
    requests = [
        EngineRequest(
            prompt=tuple(range(1, size + 1)), options=Request(max_new_tokens=9, num_loops=loops)
        )
        for size, loops in ((2, 1), (9, 3), (5, 5))
    ]
    found: dict[str, list[Event]] = {}
    for forms in ("auto", "torch"):
        model = tiny_model(config, scale=0.3)
        with kernels.use(forms):
            engine = Engine(model, EngineLimits(page_tokens=4))
            for request in requests:
                engine.add(request)
            found[forms] = [event for _ in range(11) for event in engine.step()]
            if change is not None:
                change(model)
            while not engine.idle:
                found[forms] += engine.step()
    assert found["auto"] == found["torch"]
    if change is None:
        for number, request in enumerate(requests):
            assert answers(found["auto"], number) == alone(model, request)


@pytest.mark.parametrize("forms", ["auto", "torch"])
@pytest.mark.parametrize("attention", variations(Attention), ids=name_of)
def test_mixed_depths_in_fp32_have_the_logits_of_a_forward_pass(
    attention: Attention, forms: kernels.Forms
) -> None:
    """Rows in different loops, positions and pages at a time, natively and by torch's operators."""
    config = tiny_config(attention=attention, recurrent_layers=2)
    model, drawn = tiny_model(config, scale=0.2), Sampling(temperature=1.0)
    requests = [
        EngineRequest(
            prompt=tuple(range(1, size + 1)),
            options=Request(max_new_tokens=7, num_loops=loops, sampling=drawn),
            logprobs=3,
        )
        for size, loops in ((2, 1), (9, 3), (5, 5))
    ]
    with kernels.use(forms):
        engine = Engine(model, EngineLimits(page_tokens=4))
        events = [event for event in engine.run(requests) if isinstance(event, NewToken)]
    for number, request in enumerate(requests):
        own = [event for event in events if event.request == number]
        ids = torch.tensor([[*request.prompt, *(event.token for event in own)]])
        with torch.no_grad():
            rows = model(ids, num_loops=request.options.num_loops).logits[0].log_softmax(dim=-1)
        for event, row in zip(own, rows[len(request.prompt) - 1 :], strict=False):
            assert event.logprobs is not None
            assert event.logprobs.logprob == pytest.approx(float(row[event.token]), abs=1e-4)
            found = [row[token].item() for token, _ in event.logprobs.top]
            assert [score for _, score in event.logprobs.top] == pytest.approx(found, abs=1e-4)
