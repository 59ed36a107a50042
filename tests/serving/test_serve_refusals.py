"""Bad requests: an answer in OpenAI's form that names the field, never a 500."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from openmythos.serve.answers import ErrorAnswer
from openmythos.serve.protocol import ChatRequest, CompletionRequest

JSON = {"content-type": "application/json"}
BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": 5}, "prompt", "valid string or"),
    ({"prompt": []}, "prompt", ""),
    ({"prompt": [[1], ["a"]]}, "prompt", ""),
    ({"prompt": [1, 257]}, "prompt", "ids below 257"),
    ({"promt": "a"}, "promt", "did you mean 'prompt'"),
    ({"max_tokens": 5000}, "max_tokens", "at most 4096"),
    ({"max_tokens": -1}, "max_tokens", ""),
    ({"max_tokens": True}, "max_tokens", ""),
    ({"temperature": "1"}, "temperature", "valid number"),
    ({"temperature": 3}, "temperature", ""),
    ({"top_p": 0}, "top_p", ""),
    ({"top_k": 258}, "top_k", "at most 257"),
    ({"n": 17}, "n", ""),
    ({"seed": 2**63}, "seed", ""),
    ({"stop": ["x"] * 17}, "stop", ""),
    ({"stop": "x" * 65}, "stop", ""),
    ({"stop": ""}, "stop", ""),
    ({"suffix": "x"}, "suffix", "not implemented"),
    ({"best_of": 3}, "best_of", "must equal n"),
    ({"logit_bias": {"5": 1.0}}, "logit_bias", "not implemented"),
    ({"presence_penalty": 1}, "presence_penalty", "not implemented"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options.usage", "include_usage"),
    ({"num_loops": 0}, "num_loops", ""),
    ({"num_loops": 65}, "num_loops", "at most 64"),
    ({"num_loops": 1.5}, "num_loops", ""),
    ({"exit_rule": "kl_"}, "exit_rule.kind", "did you mean 'kl'"),
    ({"exit_rule": {"kind": "kl", "threshold": 0}}, "exit_rule.threshold", "above 0"),
    ({"exit_rule": {"kind": "kl", "treshold": 1}}, "exit_rule.treshold", "'threshold'"),
]


@pytest.mark.parametrize(("body", "param", "text"), BAD)
def test_the_field_is_named(
    client: TestClient, body: dict[str, Any], param: str, text: str
) -> None:
    answer = client.post("/v1/completions", json=body)
    error = ErrorAnswer.model_validate(answer.json()).error
    assert answer.status_code == 400 and error.type == "invalid_request_error"
    assert error.param == param and text in error.message and "\n" not in error.message


@pytest.mark.parametrize(
    "body",
    [
        "",
        "{",
        "[1]",
        "null",
        '{"prompt": "a", }',
        '{"temperature": NaN}',
        '{"temperature": 1e999}',
        '{"prompt": "\\ud800"}',
        '{"\\ud800": 1}',
        '{"stop": "\\udfff"}',
        f'{{"seed": {"9" * 5000}}}',
        "[" * 100_000,
        '{"a":' * 50_000,
        json.dumps({"stop": ["x"] * 100_000}),
        json.dumps({"x" * 10_000: 1}),
        b"\xff\xfe",
    ],
)
def test_bad_json_is_the_clients_fault(client: TestClient, body: str | bytes) -> None:
    answer = client.post("/v1/completions", content=body, headers=JSON)
    assert answer.status_code == 400
    assert len(ErrorAnswer.model_validate(answer.json()).error.message) < 2000


def test_an_unknown_model_is_not_found(client: TestClient) -> None:
    odd = client.post("/v1/completions", content='{"model": "\\ud800"}', headers=JSON)
    assert odd.status_code == 404
    for answer in (
        client.post("/v1/completions", json={"model": "gpt-9"}),
        client.get("/v1/models/gpt-9"),
    ):
        error = answer.json()["error"]
        assert answer.status_code == 404 and error["code"] == "model_not_found"
        assert "tiny-lm" in error["message"]
    assert client.get("/v1/models/tiny-lm").json()["num_loops"] == 3
    assert client.get("/nowhere").json()["error"]["type"] == "not_found_error"
    assert client.get("/v1/completions").status_code == 405


NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@pytest.mark.parametrize("chat", [False, True])
@settings(max_examples=12)
@given(data=st.data())
def test_no_body_breaks_the_server(client: TestClient, chat: bool, data: st.DataObject) -> None:
    request, path = (
        (ChatRequest, "/v1/chat/completions") if chat else (CompletionRequest, "/v1/completions")
    )
    names = st.sampled_from(sorted(request.model_fields))
    body = data.draw(st.dictionaries(names, NESTED, max_size=3)) | {"max_tokens": 0}
    answer = client.post(path, content=json.dumps(body), headers=JSON)
    assert answer.status_code in (200, 400, 404), answer.text
    if answer.status_code != 200:
        ErrorAnswer.model_validate(answer.json())
