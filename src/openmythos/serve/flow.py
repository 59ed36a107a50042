"""One request for text on its way: prompts to engines, events to choices, cancellation."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from openmythos.data.tokenizer import Vocabulary
from openmythos.inference.request import EngineRequest, Finished, NewToken, PromptScored
from openmythos.serve.answers import Usage
from openmythos.serve.errors import ApiError
from openmythos.serve.jobs import LoopTable, Refused
from openmythos.serve.metrics import Metrics
from openmythos.serve.replicas import Answer, Inbox, Replicas, Ticket
from openmythos.serve.texts import ChoiceText, Piece


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A request for text in the engine's terms; `texts` has the text of each prompt, for echo."""

    requests: list[EngineRequest]
    texts: list[str]
    stops: tuple[str, ...]
    echo: bool
    seconds: float


@dataclass
class _Prompt:
    """A prompt's continuations."""

    ticket: Ticket
    request: EngineRequest
    text: str
    choices: list[ChoiceText]
    left: int
    last: float = 0.0  # when its last token arrived
    scored: PromptScored | None = None
    echoed: bool = False


@dataclass
class Flow:
    """The choices of a request while engines compute them; index = prompt * n + sample."""

    asked: Asked
    tokenizer: Vocabulary
    replicas: Replicas
    metrics: Metrics
    usage: Usage = field(default_factory=Usage)
    _inbox: Inbox = field(default_factory=Inbox)
    _prompts: dict[int, _Prompt] = field(default_factory=dict)
    _begun: float = field(default_factory=time.monotonic)

    def start(self) -> None:
        """Hand the prompts to replicas; an ApiError if they have no room."""
        tickets = self.replicas.generate(self.asked.requests, self._inbox)
        for ticket, request, text in zip(
            tickets, self.asked.requests, self.asked.texts, strict=True
        ):
            choices = [self._choice(request) for _ in range(request.n)]
            self._prompts[ticket.number] = _Prompt(ticket, request, text, choices, request.n)
            self.usage.prompt_tokens += len(request.prompt)

    def _choice(self, request: EngineRequest) -> ChoiceText:
        return ChoiceText(self.tokenizer, self.asked.stops, request.options.stop_ids)

    async def begun(self, seconds: float) -> None:
        """Wait for the first event, for so long at most; an ApiError if it is a refusal."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._inbox.arrived(), seconds)
        if self._inbox.refusal is not None:
            raise error_of(self._inbox.refusal)

    async def pieces(self) -> AsyncIterator[list[tuple[int, Piece]]]:
        """What is new of the choices, joined where it waited; an ApiError if one fails."""
        order = list(self._prompts)
        while any(prompt.left for prompt in self._prompts.values()):
            for ticket, answer in await self._next():
                self._handle(self._prompts[ticket], answer)
            found = []
            for place, prompt in enumerate(self._prompts[number] for number in order):
                for sample, choice in enumerate(prompt.choices):
                    piece = choice.take()
                    if piece is not None:
                        found.append((place * prompt.request.n + sample, piece))
            if found:
                yield found
        self.usage.total_tokens = self.usage.prompt_tokens + self.usage.completion_tokens

    async def _next(self) -> list[tuple[int, Answer]]:
        left = self._begun + self.asked.seconds - time.monotonic()
        try:
            return await asyncio.wait_for(self._inbox.take(), max(left, 0))
        except TimeoutError:
            text = f"the request took longer than {self.asked.seconds:g} s"
            raise ApiError(504, text, code="timeout") from None

    def _handle(self, prompt: _Prompt, answer: Answer) -> None:
        now = time.monotonic()
        match answer:
            case PromptScored():
                prompt.scored = answer
            case NewToken():
                self._echo(prompt)
                choice = prompt.choices[answer.sample]
                choice.push(answer)
                waited = now - (prompt.last or self._begun)
                self.metrics.token(answer.loops, waited, is_first=not prompt.last)
                prompt.last = now
                if choice.stopped:
                    prompt.ticket.cancel(answer.sample)
            case Finished():
                self._finished(prompt, answer)
            case Refused():
                raise error_of(answer)
            case LoopTable():
                raise AssertionError("a request for text gets no table of loops")

    def _finished(self, prompt: _Prompt, answer: Finished) -> None:
        self._echo(prompt)
        choice = prompt.choices[answer.sample]
        if answer.reason == "error":
            raise ApiError(500, answer.message)
        if answer.reason == "cancelled" and not choice.ended:
            raise ApiError(500, "the request was cancelled")
        choice.finish("stop" if answer.reason == "stop" else "length")
        prompt.left -= 1
        self.usage.completion_tokens += choice.tokens
        self.usage.token_loops += answer.token_loops

    def _echo(self, prompt: _Prompt) -> None:
        """Begin the choices with the prompt, once it is known whether it was scored."""
        if not self.asked.echo or prompt.echoed:
            return
        prompt.echoed = True
        for choice in prompt.choices:
            choice.echo(prompt.text, prompt.request.prompt, prompt.scored)

    def cancel(self) -> None:
        """Give up on everything that has not finished."""
        for prompt in self._prompts.values():
            prompt.ticket.cancel()


def error_of(refused: Refused) -> ApiError:
    """The answer to a request that a replica refused."""
    return ApiError(400 if refused.bad_request else 500, refused.message)
