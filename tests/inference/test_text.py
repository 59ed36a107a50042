"""Text in, text out: streaming, characters, stop tokens, exit rules."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from variants import EXIT_RULES, name_of, tiny_config, tiny_model

from openmythos.data.tokenizer import ByteTokenizer
from openmythos.inference import text as engine_module
from openmythos.inference.generation import DecodeStep, Request
from openmythos.inference.sampling import Sampling
from openmythos.inference.text import Engine
from openmythos.recurrence.exit_rules import StateChangeExit

TOKENIZER = ByteTokenizer()
REQUEST = Request(max_new_tokens=12, num_loops=3, sampling=Sampling(temperature=1.0, seed=3))
PROMPT = "a prompt"


@pytest.fixture
def engine() -> Engine:
    return Engine(tiny_model(tiny_config(vocab_size=257, context=48)), TOKENIZER)


def saying(monkeypatch: pytest.MonkeyPatch, ids: list[int]) -> None:
    """Let the model say these tokens."""

    def stream(*_args: object) -> Iterator[DecodeStep]:
        for number, token in enumerate(ids):
            yield DecodeStep(torch.tensor([token]), torch.tensor([1 + number]))

    monkeypatch.setattr(engine_module, "stream", stream)


def test_streamed_pieces_are_the_text(engine: Engine) -> None:
    pieces = list(engine.stream(PROMPT, REQUEST))
    assert "".join(piece.text for piece in pieces) == engine.generate(PROMPT, REQUEST)
    ids = [TOKENIZER.bos_id, *TOKENIZER.encode(PROMPT)]
    tokens = engine.model.generate(
        torch.tensor([ids]), max_new_tokens=12, num_loops=3, sampling=REQUEST.sampling
    )
    assert TOKENIZER.decode(tokens[0].tolist()) == engine.generate(PROMPT, REQUEST)


def test_text_is_streamed_as_it_is_decoded(engine: Engine) -> None:
    calls: list[int] = []
    engine.model.embed.register_forward_hook(lambda *_: calls.append(1))
    pieces = engine.stream(PROMPT, REQUEST)
    assert calls == []
    next(pieces)
    assert len(calls) == 1
    next(pieces)
    assert len(calls) == 2


def test_same_seed_same_text(engine: Engine) -> None:
    first = engine.generate(PROMPT, REQUEST)
    torch.manual_seed(9)
    assert engine.generate(PROMPT, REQUEST) == first
    other = replace(REQUEST, sampling=replace(REQUEST.sampling, seed=4))
    assert engine.generate(PROMPT, other) != first


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_prompt_in_pieces_gives_the_same_text(engine: Engine, chunk: int) -> None:
    wanted = engine.generate(PROMPT, REQUEST)
    assert engine.generate(PROMPT, replace(REQUEST, prefill_chunk=chunk)) == wanted


def test_empty_prompt_is_the_start_token(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    original = engine_module.stream

    def spy(model: Any, prompt: torch.Tensor, request: Request) -> Iterator[DecodeStep]:
        seen.append(prompt[0].tolist())
        return original(model, prompt, request)

    monkeypatch.setattr(engine_module, "stream", spy)
    pieces = list(engine.stream("", REQUEST))
    list(engine.stream("hé", REQUEST))
    assert seen == [[256], [256, *"hé".encode()]]
    assert len(pieces) >= REQUEST.max_new_tokens


@pytest.mark.parametrize("text", ["äöü", "\N{SNOWMAN} \N{GRINNING FACE}!", "plain"])
def test_characters_are_never_halved(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    saying(monkeypatch, list(text.encode()))
    pieces = [piece.text for piece in engine.stream("", REQUEST)]
    assert "".join(pieces) == text
    assert all(len(piece) <= 1 for piece in pieces)
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
    assert len(pieces) == len(text.encode())


def test_unfinished_character_at_the_end_is_marked(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying(monkeypatch, [97, *"\N{SNOWMAN}".encode()[:2]])
    pieces = list(engine.stream("", REQUEST))
    assert [piece.text for piece in pieces] == ["a", "", "", "\N{REPLACEMENT CHARACTER}"]
    assert [piece.loops_used for piece in pieces] == [1, 2, 3, 3]


def test_stop_token_ends_the_text_and_is_not_part_of_it(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    saying(monkeypatch, [97, 98, 256, 99])
    assert engine.generate("", replace(REQUEST, stop_ids=(256,))) == "ab"
    assert engine.generate("", REQUEST) == "abc"  # bos is not text
    saying(monkeypatch, [256])
    assert list(engine.stream("", replace(REQUEST, stop_ids=(256,)))) == []


def test_stop_token_of_a_real_model(engine: Engine) -> None:
    greedy = replace(REQUEST, sampling=Sampling())
    ids = torch.tensor([[TOKENIZER.bos_id]])
    tokens = engine.model.generate(ids, max_new_tokens=12, num_loops=3)[0].tolist()
    stop = tokens[4]
    before = tokens[: tokens.index(stop)]
    assert engine.generate("", replace(greedy, stop_ids=(stop,))) == TOKENIZER.decode(before)


@pytest.mark.parametrize("rule", EXIT_RULES, ids=name_of)
def test_loops_used_are_told(engine: Engine, rule: Any) -> None:
    request = replace(REQUEST, num_loops=4, exit_rule=rule)
    loops = [piece.loops_used for piece in engine.stream(PROMPT, request)]
    assert all(1 <= used <= 4 for used in loops)
    if rule.kind == "fixed":
        assert set(loops) == {4}


def test_eager_exit_uses_fewer_loops(engine: Engine) -> None:
    request = replace(REQUEST, num_loops=4, exit_rule=StateChangeExit(threshold=100.0))
    assert max(piece.loops_used for piece in engine.stream(PROMPT, request)) < 4


@pytest.mark.parametrize("training", [True, False])
def test_model_is_left_in_its_mode(engine: Engine, training: bool) -> None:
    engine.model.train(training)
    engine.generate(PROMPT, REQUEST)
    assert engine.model.training is training
    pieces = engine.stream(PROMPT, REQUEST)
    next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert engine.model.training is training


def test_bad_requests_are_refused_before_the_first_piece(engine: Engine) -> None:
    with pytest.raises(ValueError, match="longer than the context of 48"):
        engine.stream("x" * 40, REQUEST)
    with pytest.raises(ValueError, match="top_k = 999"):
        engine.stream("", replace(REQUEST, sampling=Sampling(top_k=999)))


def test_no_new_tokens_is_no_text(engine: Engine) -> None:
    assert list(engine.stream(PROMPT, replace(REQUEST, max_new_tokens=0))) == []
