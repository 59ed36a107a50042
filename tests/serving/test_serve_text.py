"""/v1/completions and /v1/chat/completions against the model alone."""

import json
import time
from collections.abc import Callable
from itertools import chain
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from serving.conftest import client_of, wait_until
from starlette.testclient import TestClient

from openmythos.data.tokenizer import ByteTokenizer
from openmythos.inference.generation import Request, stream
from openmythos.inference.sampling import Sampling
from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.exit_rules import KLExit, StateChangeExit
from openmythos.serve.answers import Chat, ChatChunk, Completion
from openmythos.serve.service import Service

BYTES = ByteTokenizer()


def complete(client: TestClient, **body: Any) -> dict[str, Any]:
    """The answer to a request for a completion."""
    answer = client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    Completion.model_validate(found)
    return found


def events(client: TestClient, path: str, **body: Any) -> list[Any]:
    """The events of a stream, the last of which says that it is complete."""
    with client.stream("POST", path, json={**body, "stream": True}) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        parts = "".join(answer.iter_text()).split("\n\n")
    assert parts.pop() == ""
    assert parts.pop() == "data: [DONE]"
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def alone(model: OpenMythos, prompt: str, request: Request) -> tuple[list[int], list[int]]:
    """Tokens and loops of the model by itself; a token that ends the text is left out."""
    steps = list(stream(model, torch.tensor([BYTES.prompt_ids(prompt)]), request))
    tokens = [int(step.tokens[0]) for step in steps]
    loops = [int(step.loops_used[0]) for step in steps]
    kept = len(tokens) - (tokens[-1] in request.stop_ids)
    return tokens[:kept], loops[:kept]


@pytest.mark.parametrize("num_loops", [1, 5])
@pytest.mark.parametrize("rule", ["fixed", "kl", {"kind": "state_change", "threshold": 0.12}])
def test_tokens_and_loops_are_those_of_the_model_alone(
    client: TestClient, model: OpenMythos, num_loops: int, rule: Any
) -> None:
    found = complete(
        client,
        prompt="abc",
        max_tokens=12,
        temperature=0.7,
        seed=11,
        num_loops=num_loops,
        exit_rule=rule,
        return_loops=True,
    )
    rules = {"kl": KLExit(), "fixed": None}
    chosen = rules[rule] if isinstance(rule, str) else StateChangeExit(threshold=0.12)
    asked = Request(
        max_new_tokens=12,
        num_loops=num_loops,
        sampling=Sampling(temperature=0.7, seed=11),
        stop_ids=BYTES.stop_ids,
    )
    if chosen is not None:
        asked = Request(**{**vars(asked), "exit_rule": chosen})
    tokens, loops = alone(model, "abc", asked)
    (choice,) = found["choices"]
    assert choice["token_ids"] == tokens and choice["loops"] == loops
    assert choice["text"] == BYTES.decode(tokens)
    # The first new token is said by the prompt's last position, the last new one is not read.
    prompt_loops = found["usage"]["token_loops"] - sum(loops[1:])
    assert 4 <= prompt_loops <= 4 * num_loops


@pytest.mark.parametrize("jump", [-1e9, 1e9])
def test_a_jump_of_the_clock_ends_nothing(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Limits of time are of a clock that does not jump."""
    asked = {"prompt": "ab", "max_tokens": 9, "temperature": 0, "ignore_eos": True}
    before, now = complete(client, **asked), time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    after = complete(client, **asked)
    assert abs(after["created"] - before["created"] - jump) < 60
    assert after["choices"] == before["choices"]
    # Tokens that are there at once come in one event, so their number says nothing.
    streamed = events(client, "/v1/completions", **asked)
    text = "".join(choice["text"] for event in streamed for choice in event["choices"])
    assert text == before["choices"][0]["text"]
    assert client.get("/health").json()["status"] == "ok"


def test_all_forms_of_prompts(client: TestClient) -> None:
    ids = [BYTES.prompt_ids(text) for text in ("ab", "c")]
    asked = {"max_tokens": 4, "temperature": 0}
    one = [complete(client, prompt=x, **asked)["choices"][0]["text"] for x in ("ab", ids[1])]
    for prompt in (["ab", "c"], ids):
        found = complete(client, prompt=prompt, **asked)["choices"]
        assert [choice["text"] for choice in found] == one
        assert [choice["index"] for choice in found] == [0, 1]


def test_choices_have_seeds_of_their_own(client: TestClient) -> None:
    asked: dict[str, Any] = {"max_tokens": 6, "temperature": 1.5, "return_loops": True}
    found = complete(client, prompt=["ab", "c"], n=2, seed=5, **asked)["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2, 3]
    single = complete(client, prompt="c", seed=6, **asked)["choices"][0]
    assert found[3]["token_ids"] == single["token_ids"]
    # Without a seed every request draws anew.
    several = {complete(client, prompt="c", **asked)["choices"][0]["text"] for _ in range(4)}
    assert len(several) > 1


def test_echo_has_the_logprobs_of_a_forward_pass(client: TestClient, model: OpenMythos) -> None:
    found = complete(
        client, prompt="hello", max_tokens=0, echo=True, logprobs=3, num_loops=2, temperature=0
    )
    (choice,) = found["choices"]
    ids = BYTES.prompt_ids("hello")
    with torch.no_grad():
        rows = F.log_softmax(model(torch.tensor([ids]), num_loops=2).logits[0], dim=-1)
    expected = [float(row[token]) for row, token in zip(rows, ids[1:], strict=False)]
    got = choice["logprobs"]
    assert choice["text"] == "hello" and got["token_logprobs"][0] is None
    assert got["token_logprobs"][1:] == pytest.approx(expected, abs=1e-4)
    best = [max(top.values()) for top in got["top_logprobs"][1:]]
    assert best == pytest.approx(rows[:-1].max(dim=-1).values.tolist(), abs=1e-4)
    assert got["tokens"] == ["", *"hello"] and got["text_offset"] == [0, 0, 1, 2, 3, 4]


def test_a_greedy_token_is_exactly_its_best_logprob(client: TestClient) -> None:
    """lm-eval compares the two numbers with ==."""
    found = complete(client, prompt="ab", max_tokens=6, temperature=0, logprobs=1)
    got = found["choices"][0]["logprobs"]
    assert [max(top.values()) for top in got["top_logprobs"]] == got["token_logprobs"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_stream_joins_to_the_whole_answer(
    make_service: Callable[..., Service], tmp_path: Any, path: str
) -> None:
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}")
    is_chat = "chat" in path
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    body: dict[str, Any] = {"n": 2, "seed": 3, "return_loops": True, "max_tokens": 9}
    body |= {"messages": messages, "logprobs": True, "top_logprobs": 2} if is_chat else {}
    body |= {} if is_chat else {"prompt": "user:hi;", "logprobs": 2}
    options = {"stream_options": {"include_usage": True}}
    with client_of(make_service(chat_template=str(template))) as client:
        wait_until(lambda: client.get("/ready").status_code == 200)
        whole = client.post(path, json=body).json()
        *chunks, last = events(client, path, **body, **options)
    (Chat if is_chat else Completion).model_validate(whole)
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    for chunk in chunks:
        (ChatChunk if is_chat else Completion).model_validate(chunk)
        assert chunk["usage"] is None
    for choice in whole["choices"]:
        mine = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        for name in ("loops", "token_ids"):
            assert list(chain.from_iterable(c[name] for c in mine)) == choice[name]
        if is_chat:
            text = "".join(c["delta"]["content"] for c in mine)
            assert text == choice["message"]["content"] and mine[0]["delta"]["role"] == "assistant"
            assert all("role" not in c["delta"] for c in mine[1:])
            got = list(chain.from_iterable(c["logprobs"]["content"] for c in mine))
            assert got == choice["logprobs"]["content"]
        else:
            assert "".join(c["text"] for c in mine) == choice["text"]
            got = list(chain.from_iterable(c["logprobs"]["text_offset"] for c in mine))
            assert got == choice["logprobs"]["text_offset"]
        assert [c["finish_reason"] for c in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]


def test_stop_strings_cut_the_text_and_end_the_work(client: TestClient) -> None:
    asked: dict[str, Any] = {"prompt": "abc", "max_tokens": 40, "seed": 2, "temperature": 1}
    text = complete(client, **asked)["choices"][0]["text"]
    place = next(i for i in range(4, len(text)) if text[i].isascii())
    stop = text[place]
    found = complete(client, stop=["never there", stop], **asked)
    (choice,) = found["choices"]
    assert choice["text"] == text[: text.index(stop)] and choice["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] < 40
    wait_until(lambda: client.get("/engine").json()["rows"] == [], 2)


def test_the_context_bounds_what_is_made(client: TestClient) -> None:
    long = "x" * 90
    found = complete(client, prompt=long, max_tokens=50, temperature=0, ignore_eos=True)
    assert found["usage"] == {**found["usage"], "prompt_tokens": 91, "completion_tokens": 5}
    assert found["choices"][0]["finish_reason"] == "length"
    full = complete(client, prompt="x" * 95, max_tokens=1, echo=True, logprobs=0)
    assert len(full["choices"][0]["logprobs"]["tokens"]) == 96
    for text in ("x" * 95, "x" * 96):
        answer = client.post("/v1/completions", json={"prompt": text, "max_tokens": 1})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, "prompt")
        assert error["code"] == "context_length_exceeded"


def test_a_model_without_a_chat_template_says_so(client: TestClient) -> None:
    body = {"messages": [{"role": "user", "content": "hi"}]}
    answer = client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]


def test_tokens_go_to_text_and_back(client: TestClient) -> None:
    text = "caf\u00e9 \U0001f642"
    tokens = client.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert tokens == BYTES.prompt_ids(text)
    assert client.post("/detokenize", json={"tokens": tokens}).json() == {"prompt": text}
    eos = client.get("/tokenizer_info").json()["eos_token"]
    assert client.post("/tokenize", json={"prompt": eos}).json()["tokens"] == [BYTES.bos_id]
