"""Accuracy on a task, by hops and by loops."""

from collections.abc import Sequence

import torch

from openmythos.eval.likelihood import logits_by_loops
from openmythos.machine import autocast, choose_precision
from openmythos.model.mythos import OpenMythos
from openmythos.tasks import Task
from openmythos.train.task_source import accuracy

# Problems of n hops are drawn from this seed + n; far from the seeds of training.
ASKED_SEED = 10_000


@torch.no_grad()
def accuracy_map(
    model: OpenMythos,
    task: Task,
    hops: Sequence[int],
    loops: Sequence[int],
    *,
    examples: int = 400,
    precision: str = "fp32",
) -> dict[int, dict[int, float]]:
    """Accuracy at h hops after T loops, as found[h][T]; one pass gives all T."""
    model.eval()
    found: dict[int, dict[int, float]] = {}
    for hop in hops:
        generator = torch.Generator().manual_seed(ASKED_SEED + hop)
        batch = task.sample(examples, hop, generator).to(model.device)
        with autocast(choose_precision(precision, model.device), model.device):
            logits = logits_by_loops(model, batch.tokens, loops, last_only=True)
        found[hop] = {
            loop: float(accuracy(after[:, 0], batch.answers())) for loop, after in logits.items()
        }
    return found
