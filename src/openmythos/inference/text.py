"""Text generation: a model and its tokenizer, streaming."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from openmythos.data.tokenizer import StreamDecoder, Tokenizer
from openmythos.inference.generation import DecodableModel, DecodeStep, Request, stream


class TextPiece(NamedTuple):
    """Newly decoded text (possibly none yet, within a character) and the loops that it took."""

    text: str
    loops_used: int


class StopStrings:
    """Ends a stream of text before the first occurrence of any of some strings.

    Of two that occur, the one that is complete first counts; of two complete at once, the longer.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        if not all(strings):
            raise ValueError("stop: holds an empty string")
        self._strings = tuple(strings)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Text that can be shown: without what may be the beginning of a stop string."""
        if self.found is not None:
            return ""
        before, self._held = len(self._held), self._held + text
        for end in range(before + 1, len(self._held) + 1):
            ending = [x for x in self._strings if self._held.endswith(x, 0, end)]
            if ending:
                self.found = max(ending, key=len)
                shown, self._held = self._held[: end - len(self.found)], ""
                return shown
        keep = max((self._begun(x) for x in self._strings), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """At the end of the text: what was held back."""
        rest, self._held = self._held, ""
        return rest

    def _begun(self, string: str) -> int:
        """How many last characters of the held text are the beginning of a stop string."""
        longest = min(len(string) - 1, len(self._held))
        return next(n for n in range(longest, -1, -1) if self._held.endswith(string[:n]))


class Engine:
    """Continues prompts with a model; an empty prompt starts from the start token alone."""

    def __init__(self, model: DecodableModel, tokenizer: Tokenizer) -> None:
        self.model = model
        self.tokenizer = tokenizer

    def stream(self, prompt: str, request: Request) -> Iterator[TextPiece]:
        """Yield the continuation token by token; it ends early where a new document would start."""
        ids = self.tokenizer.prompt_ids(prompt)
        steps = stream(self.model, torch.tensor([ids], device=self.model.device), request)
        return self._pieces(steps, request)

    def _pieces(self, steps: Iterator[DecodeStep], request: Request) -> Iterator[TextPiece]:
        decoder = StreamDecoder(self.tokenizer)
        loops = 0
        for step in steps:
            token, loops = int(step.tokens[0]), int(step.loops_used[0])
            if token in request.stop_ids:
                break
            yield TextPiece(decoder.push(token), loops)
        rest = decoder.finish()
        if rest:
            yield TextPiece(rest, loops)

    def generate(self, prompt: str, request: Request) -> str:
        """The whole continuation."""
        return "".join(piece.text for piece in self.stream(prompt, request))
