"""Addition of many operands, and parity."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openmythos.config import require_int
from openmythos.tasks.batch import IGNORE, TaskBatch, answer_only
from openmythos.tasks.chains import Supervision

PLUS, EQUALS = 10, 11


@dataclass(frozen=True, kw_only=True)
class Addition:
    """a_1 + a_2 + ... + a_n = sum, each operand of `digits` digits, most significant first.

    The sum is written least significant digit first, as carries go, with as many digits as the
    largest sum of max_operands has. The difficulty is n. An answer is right if every digit is;
    `answer_at` is the position of the last one.
    """

    kind: Literal["addition"] = "addition"
    digits: int = 3
    max_operands: int = 32

    def __post_init__(self) -> None:
        require_int("digits", self.digits, minimum=1, maximum=9)
        require_int("max_operands", self.max_operands, minimum=2)

    @property
    def vocab_size(self) -> int:
        """Ten digits, plus, equals."""
        return 12

    @property
    def answer_digits(self) -> int:
        return len(str(self.max_operands * (10**self.digits - 1)))

    def sample(self, batch: int, hops: int, generator: torch.Generator) -> TaskBatch:
        """`batch` sums of exactly `hops` operands."""
        require_int("hops", hops, minimum=2, maximum=self.max_operands)
        return self.write(torch.randint(10**self.digits, (batch, hops), generator=generator))

    def write(self, operands: Tensor) -> TaskBatch:
        """The problems of given operands [batch, n]."""
        batch = operands.shape[0]
        powers = 10 ** torch.arange(self.digits - 1, -1, -1)
        written = operands[..., None] // powers % 10
        signs = torch.full((*operands.shape, 1), PLUS)
        signs[:, -1] = EQUALS
        question = torch.cat((written, signs), dim=2).flatten(1)
        answer = operands.sum(dim=1)[:, None] // 10 ** torch.arange(self.answer_digits) % 10
        tokens = torch.cat((question, answer[:, :-1]), dim=1)
        ignored = torch.full((batch, question.shape[1] - 1), IGNORE)
        targets = torch.cat((ignored, answer), dim=1)
        return TaskBatch(tokens, targets, torch.full((batch,), tokens.shape[1] - 1))


@dataclass(frozen=True, kw_only=True)
class Parity:
    """b_1 ... b_n -> their sum modulo 2."""

    kind: Literal["parity"] = "parity"
    supervision: Supervision = "answer"

    @property
    def vocab_size(self) -> int:
        return 2

    def sample(self, batch: int, hops: int, generator: torch.Generator) -> TaskBatch:
        """`batch` words of exactly `hops` bits."""
        bits = torch.randint(2, (batch, hops), generator=generator)
        made = TaskBatch(bits, bits.cumsum(dim=1) % 2, torch.full((batch,), hops - 1))
        return made if self.supervision == "prefix" else answer_only(made)
