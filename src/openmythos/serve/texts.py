"""From the events of an engine to text: decoding, stop strings, log-probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from openmythos.data.tokenizer import StreamDecoder, Vocabulary
from openmythos.inference.request import NewToken, PromptScored, TokenLogprobs
from openmythos.inference.text import StopStrings
from openmythos.serve.answers import (
    ChatLogprobs,
    CompletionLogprobs,
    Reason,
    TokenLogprob,
    TopLogprob,
)


@dataclass
class Piece:
    """What is new of a choice: text, and its tokens with their log-probabilities and loops."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs | None] = field(default_factory=list)
    loops: list[int] = field(default_factory=list)
    finish: Reason | None = None

    def join(self, later: "Piece") -> None:
        """Add the piece that follows."""
        self.text += later.text
        self.tokens += later.tokens
        self.logprobs += later.logprobs
        self.loops += later.loops
        self.finish = later.finish


class ChoiceText:
    """Collects what an engine sends of one continuation; `take` gives what has not been taken.

    A token that ends the text is no part of it. `stopped` is set once a stop string has occurred.
    """

    def __init__(
        self, tokenizer: Vocabulary, stops: Sequence[str], stop_ids: Sequence[int]
    ) -> None:
        self._decoder, self._vocab_size = StreamDecoder(tokenizer), tokenizer.vocab_size
        self._stops, self._stop_ids = StopStrings(stops), stop_ids
        self._piece = Piece()
        self.tokens = 0  # all that the engine sent, as usage counts them
        self.ended = self.stopped = False

    def echo(self, text: str, tokens: Sequence[int], scored: PromptScored | None) -> None:
        """Begin with the prompt."""
        none: list[TokenLogprobs | None] = [None] * len(tokens)
        self._piece.text += text
        self._piece.tokens += tokens
        self._piece.logprobs += none if scored is None else scored.logprobs
        self._piece.loops += [0] * len(tokens) if scored is None else scored.loops

    def push(self, event: NewToken) -> None:
        """Add a token."""
        if self.ended:
            return
        self.tokens += 1
        if event.token in self._stop_ids:
            return
        piece = self._piece
        # A vocabulary is often padded: ids beyond the tokenizer's have no text.
        known = event.token < self._vocab_size
        piece.text += self._stops.push(self._decoder.push(event.token) if known else "")
        piece.tokens.append(event.token)
        piece.logprobs.append(event.logprobs)
        piece.loops.append(event.loops)
        if self._stops.found is not None:
            self.stopped = True
            self._end("stop")

    def finish(self, reason: Reason) -> None:
        """The engine has ended the continuation."""
        if not self.ended:
            self._piece.text += self._stops.push(self._decoder.finish()) + self._stops.finish()
            self._end(reason)

    def _end(self, reason: Reason) -> None:
        self.ended, self._piece.finish = True, reason

    def take(self) -> Piece | None:
        """What is new since the last call; None if nothing is."""
        piece, self._piece = self._piece, Piece()
        return piece if piece.text or piece.tokens or piece.finish else None


def token_text(tokenizer: Vocabulary, token: int) -> str:
    """The text of one token; bytes that are no whole character are written as bytes:\\x.."""
    data = _bytes_of(tokenizer, token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in data)


def _bytes_of(tokenizer: Vocabulary, token: int) -> bytes:
    return tokenizer.token_bytes[token] if token < tokenizer.vocab_size else b""


def completion_logprobs(
    tokenizer: Vocabulary, piece: Piece, top: int, offset: int
) -> CompletionLogprobs:
    """Log-probabilities of a piece that starts `offset` characters into its choice."""
    texts = [token_text(tokenizer, token) for token in piece.tokens]
    offsets, at = [], offset
    for text in texts:
        offsets.append(at)
        at += len(text)
    best: list[dict[str, float] | None] = []
    for found in piece.logprobs:
        # Two tokens may have the same text: the likelier one comes first and is kept.
        by_text: dict[str, float] = {}
        for token, value in () if found is None else found.top:
            by_text.setdefault(token_text(tokenizer, token), value)
        best.append(by_text if found is not None else None)
    values = [None if found is None else found.logprob for found in piece.logprobs]
    return CompletionLogprobs(
        tokens=texts,
        token_logprobs=values,
        top_logprobs=best if top else None,
        text_offset=offsets,
    )


def chat_logprobs(tokenizer: Vocabulary, piece: Piece) -> ChatLogprobs:
    """Log-probabilities of a piece, as /v1/chat/completions writes them."""

    def one(token: int, value: float) -> TopLogprob:
        data = list(_bytes_of(tokenizer, token))
        return TopLogprob(token=token_text(tokenizer, token), logprob=value, bytes=data)

    content = []
    for token, found in zip(piece.tokens, piece.logprobs, strict=True):
        if found is not None:
            top = [one(other, value) for other, value in found.top]
            own = one(token, found.logprob)
            content.append(TokenLogprob(**dict(own), top_logprobs=top))
    return ChatLogprobs(content=content)
