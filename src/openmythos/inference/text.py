"""Text generation: a model and its tokenizer, streaming."""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from openmythos.data.tokenizer import StreamDecoder, Tokenizer
from openmythos.inference.generation import DecodableModel, DecodeStep, Request, stream


class TextPiece(NamedTuple):
    """Newly decoded text (possibly none yet, within a character) and the loops that it took."""

    text: str
    loops_used: int


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
