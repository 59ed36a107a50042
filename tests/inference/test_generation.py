"""Decoding needs no model of ours: a mock of a few lines that counts upwards."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from openmythos.inference.generation import DecodableModel, Request, stream


@dataclass
class Counting:
    """The next token is the last one plus 1; its loops are the tokens so far, at most num_loops."""

    vocab_size: int = 10
    context: int = 32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seen: list[int] = field(default_factory=list)  # tokens of each call
    decoding: bool = False

    def new_cache(self, batch: int, capacity: int, **_: Any) -> Any:
        return self

    def begin_decode(self) -> None:
        self.decoding = True

    def next_logits(self, tokens: Tensor, *, num_loops: int, **_: Any) -> tuple[Tensor, Tensor]:
        self.seen.append(tokens.shape[1])
        following = (tokens[:, -1] + 1) % self.vocab_size
        logits = torch.nn.functional.one_hot(following, self.vocab_size).float()
        return logits, torch.full((len(tokens),), min(num_loops, sum(self.seen)))


def test_prefill_in_chunks_then_a_token_at_a_time() -> None:
    model, prompt = Counting(), torch.tensor([[1, 2, 3, 4, 5], [0, 0, 0, 0, 8]])
    assert isinstance(model, DecodableModel)
    steps = list(stream(model, prompt, Request(max_new_tokens=4, num_loops=7, prefill_chunk=2)))
    assert torch.stack([s.tokens for s in steps], dim=1).tolist() == [[6, 7, 8, 9], [9, 0, 1, 2]]
    assert model.seen == [2, 2, 1, 1, 1, 1] and model.decoding
    assert [s.loops_used.tolist() for s in steps] == [[5, 5], [6, 6], [7, 7], [7, 7]]


def test_a_row_that_has_ended_repeats_its_stop_token_until_all_have() -> None:
    model, prompt = Counting(), torch.tensor([[5], [2]])
    steps = list(stream(model, prompt, Request(max_new_tokens=9, stop_ids=(7,))))
    tokens = torch.stack([s.tokens for s in steps], dim=1).tolist()
    assert tokens == [[6, 7, 7, 7, 7], [3, 4, 5, 6, 7]]


def test_a_request_is_checked_before_the_model_is_called() -> None:
    model = Counting()
    with pytest.raises(ValueError, match="longer than the context of 32"):
        stream(model, torch.tensor([[1]]), Request(max_new_tokens=32))
    with pytest.raises(ValueError, match="outside the vocabulary of 10"):
        stream(model, torch.tensor([[10]]), Request(max_new_tokens=1))
    assert model.seen == []


def test_what_is_yielded_may_be_used_in_training() -> None:
    table = torch.ones(10, 1, requires_grad=True)
    for step in stream(Counting(), torch.tensor([[1, 2]]), Request(max_new_tokens=2)):
        (torch.nn.functional.embedding(step.tokens, table)[:, 0] * step.loops_used).sum().backward()
    assert table.grad is not None and table.grad.sum() == 2 + 3
