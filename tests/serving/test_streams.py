"""Streams to slow, silent and leaving clients; text from tokens."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from openmythos.data.tokenizer import ByteTokenizer
from openmythos.inference.request import NewToken
from openmythos.serve.errors import ApiError
from openmythos.serve.limits import ServerLimits
from openmythos.serve.sse import EventStream
from openmythos.serve.texts import ChoiceText, Piece

LIMITS = ServerLimits(write_seconds=0.05, keep_alive_seconds=0.02)


class Client:
    """An ASGI client that takes `most` messages, and leaves after `leaves` seconds."""

    def __init__(self, most: int = 1000, leaves: float = 1000) -> None:
        self.most, self.leaves = most, leaves
        self.messages: list[Message] = []

    async def receive(self) -> Message:
        await asyncio.sleep(self.leaves)
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if len(self.messages) >= self.most:
            await asyncio.sleep(1000)
        self.messages.append(message)

    @property
    def text(self) -> str:
        return b"".join(m.get("body", b"") for m in self.messages).decode()

    @property
    def complete(self) -> bool:
        return self.messages[-1].get("more_body") is False


def run(client: Client, events: AsyncIterator[str]) -> list[int]:
    """The statuses that the stream counted."""
    statuses: list[int] = []
    stream = EventStream(events, LIMITS, statuses.append)
    asyncio.run(stream({"type": "http"}, client.receive, client.send))
    return statuses


async def slowly(count: int, seconds: float) -> AsyncIterator[str]:
    for number in range(count):
        await asyncio.sleep(seconds)
        yield str(number)


def test_a_stream_ends_with_done() -> None:
    client = Client()
    assert run(client, slowly(2, 0)) == [200]
    assert client.text == "data: 0\n\ndata: 1\n\ndata: [DONE]\n\n" and client.complete


def test_a_silent_stream_shows_that_it_lives() -> None:
    client = Client()
    run(client, slowly(1, 0.07))
    before, after = client.text.split("data: 0")
    assert before.count(": keep-alive\n\n") >= 2 and after == "\n\ndata: [DONE]\n\n"


def test_a_client_that_takes_nothing_is_given_up() -> None:
    client = Client(most=2)
    assert run(client, slowly(1000, 0)) == [499]
    assert not client.complete


def test_a_client_that_leaves_ends_the_work() -> None:
    client = Client(leaves=0.03)
    assert run(client, slowly(1, 1000)) == [499]
    assert not client.complete


def test_an_error_in_a_stream_is_sent_and_the_answer_stays_incomplete() -> None:
    async def failing() -> AsyncIterator[str]:
        yield "0"
        raise ApiError(500, "broken")

    client = Client()
    assert run(client, failing()) == [500]
    *_, last, rest = client.text.split("\n\n")
    assert rest == "" and json.loads(last.removeprefix("data: "))["error"]["message"] == "broken"
    assert "[DONE]" not in client.text and not client.complete


@given(
    text=st.text(max_size=12),
    stops=st.lists(st.text(min_size=1, max_size=3), max_size=2),
    breaks=st.lists(st.booleans(), min_size=50, max_size=50),
)
def test_pieces_join_to_the_text_before_the_first_stop(
    text: str, stops: list[str], breaks: list[bool]
) -> None:
    tokenizer = ByteTokenizer()
    choice, whole = ChoiceText(tokenizer, stops, (256,)), Piece()
    for index, token in enumerate([*text.encode(), 256]):
        choice.push(NewToken(request=0, sample=0, token=token, loops=1 + index))
        if breaks[index] and (piece := choice.take()):
            whole.join(piece)
    choice.finish("length")
    if rest := choice.take():
        whole.join(rest)
    ends = [(text.find(x) + len(x), -len(x)) for x in stops if x in text]
    expected = text if not ends else text[: min(ends)[0] + min(ends)[1]]
    assert whole.text == expected and whole.finish == ("stop" if ends else "length")
    assert whole.loops == list(range(1, len(whole.tokens) + 1))
    assert text.encode().startswith(bytes(whole.tokens))


def test_a_token_that_the_tokenizer_does_not_have_is_no_text() -> None:
    choice = ChoiceText(ByteTokenizer(), (), ())
    for token in (97, 300, 98):
        choice.push(NewToken(request=0, sample=0, token=token, loops=1))
    piece = choice.take()
    assert piece is not None and (piece.text, piece.tokens) == ("ab", [97, 300, 98])


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_limits_are_checked(seconds: float) -> None:
    with pytest.raises(ValueError, match="write_seconds"):
        ServerLimits(write_seconds=seconds)
