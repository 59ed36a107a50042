"""Names for the tokens of a task, so that its problems can be written as text."""

from collections.abc import Sequence

from openmythos.config import require
from openmythos.tasks import FactPairs, KHop, Task

PAD = "pad"


def words(task: Task) -> tuple[str, ...]:
    """One word per token id: e0 e1 ... r0 r1 ... pad ask for chains of facts, else t0 t1 ..."""
    if isinstance(task, KHop | FactPairs):
        entities = (f"e{i}" for i in range(task.num_entities))
        relations = (f"r{i}" for i in range(task.num_relations))
        return (*entities, *relations, PAD, "ask")
    return tuple(f"t{i}" for i in range(task.vocab_size))


class Words:
    """Encodes the words of a task as ids; a task has no start token."""

    bos_id: int | None = None

    def __init__(self, task: Task) -> None:
        self._words = words(task)
        self._ids = {word: token for token, word in enumerate(self._words)}

    def encode(self, text: str) -> list[int]:
        """Ids of the words between spaces; a ConfigError names an unknown one."""
        for word in text.split():
            require(word in self._ids, "word", word, f"must be one of {', '.join(self._words)}")
        return [self._ids[word] for word in text.split()]

    def decode(self, ids: Sequence[int]) -> str:
        """The words, with spaces between them."""
        return " ".join(self._words[token] for token in ids)
