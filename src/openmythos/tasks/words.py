"""Names for the tokens of a task, so that its problems can be written as text."""

from openmythos.tasks import KHop, SystematicHops, Task

PAD = "pad"


def words(task: Task) -> tuple[str, ...]:
    """One word per token id: e0 e1 ... r0 r1 ... pad ask for chains of facts, else t0 t1 ..."""
    if isinstance(task, KHop | SystematicHops):
        entities = (f"e{i}" for i in range(task.num_entities))
        relations = (f"r{i}" for i in range(task.num_relations))
        return (*entities, *relations, PAD, "ask")
    return tuple(f"t{i}" for i in range(task.vocab_size))
