"""Facts and pairs of facts as English sentences, of which some pairs are never composed."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openmythos.config import require_int
from openmythos.tasks.batch import IGNORE, TaskBatch
from openmythos.tasks.pairs import FactPairs, Part

# A is an entity, R and S are relations: S of what R of A is. The answer follows the last word.
ONE = ("the R of A is", "A has as R", "who is the R of A ?", "A 's R is")
TWO = (
    "the S of the R of A is",
    "the R of A has as S",
    "who is the S of the R of A ?",
    "A 's R 's S is",
)
WORDS = tuple(dict.fromkeys(" ".join((*ONE, *TWO)).replace("A", "").split()))
FUNCTION = tuple(word for word in WORDS if word not in ("R", "S"))


@dataclass(frozen=True, kw_only=True)
class EnglishPairs:
    """The rows of `FactPairs` as sentences; the only target is the answer, behind the sentence.

    Every sentence is written in one of four ways, drawn at random; of two hops, training knows all
    but the last `unseen` ways. Shorter sentences are padded at the end.
    """

    kind: Literal["english_pairs"] = "english_pairs"
    num_entities: int = 25
    num_relations: int = 28
    facts_seed: int = 0
    unseen: int = 1

    def __post_init__(self) -> None:
        require_int("unseen", self.unseen, minimum=0, maximum=len(TWO) - 1)
        _ = self.pairs

    @property
    def pairs(self) -> FactPairs:
        """The same facts, pairs and parts."""
        return FactPairs(
            num_entities=self.num_entities,
            num_relations=self.num_relations,
            facts_seed=self.facts_seed,
        )

    @property
    def padding(self) -> int:
        """The padding token."""
        return self.num_entities + self.num_relations + len(FUNCTION)

    @property
    def vocab_size(self) -> int:
        """Entities, relations, function words, padding."""
        return self.padding + 1

    @property
    def ways(self) -> int:
        """How many ways of writing two hops training knows."""
        return len(TWO) - self.unseen

    def sample(
        self, batch: int, hops: int, generator: torch.Generator, part: Part = "train"
    ) -> TaskBatch:
        """`batch` sentences of a part; "train" with two hops includes rows of one fact."""
        made = self.pairs.sample(batch, hops, generator, part)
        ways = torch.randint(len(ONE), (batch,), generator=generator)
        two = made.answer_at == 2
        ways = torch.where(two, ways % self.ways, ways)
        rows = made.tokens.clone()
        rows[:, 1:] -= self.num_entities
        return self.written(rows, made.answers(), ways, two)

    def written(self, rows: Tensor, answers: Tensor, ways: Tensor, two: Tensor) -> TaskBatch:
        """Sentences of rows (entity, relation, and where `two` a second one) [batch, 2 or 3]."""
        texts = [
            (TWO if double else ONE)[way].split()
            for way, double in zip(ways.tolist(), two.tolist(), strict=True)
        ]
        width = max(len(words.split()) for words in (*ONE, *TWO))
        tokens = torch.full((len(rows), width), self.padding)
        for number, (words, row) in enumerate(zip(texts, rows.tolist(), strict=True)):
            ids = [self._id(word, row) for word in words]
            tokens[number, : len(ids)] = torch.tensor(ids)
        last = torch.tensor([len(words) - 1 for words in texts])
        targets = torch.full_like(tokens, IGNORE)
        targets[torch.arange(len(rows)), last] = answers
        return TaskBatch(tokens, targets, last)

    def asked(self, part: Part, most: int, way: int) -> TaskBatch:
        """At most so many pairs of a part, all written in one way."""
        rows = self.pairs.pairs(part)[:most]
        answers = self.pairs.asked(rows).answers()
        ways = torch.full((len(rows),), way)
        return self.written(rows, answers, ways, torch.ones(len(rows), dtype=torch.bool))

    def _id(self, word: str, row: list[int]) -> int:
        if word == "A":
            return row[0]
        if word in ("R", "S"):
            return self.num_entities + row[1 if word == "R" else 2]
        return self.num_entities + self.num_relations + FUNCTION.index(word)
