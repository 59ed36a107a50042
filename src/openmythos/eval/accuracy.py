"""Accuracy on a task, by hops and by loops."""

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from openmythos.eval.likelihood import logits_by_loops
from openmythos.machine import autocast, choose_precision
from openmythos.model.mythos import OpenMythos
from openmythos.tasks import Task
from openmythos.train.task_source import accuracy

# Problems of n hops are drawn from this seed + n; far from the seeds of training.
ASKED_SEED = 10_000
# The same for validation: learning rates are chosen on other problems than those reported.
VALIDATION_SEED = 20_000


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


@torch.no_grad()
def task_loss(
    model: OpenMythos,
    task: Task,
    hops: Sequence[int],
    loops: Callable[[int], int],
    *,
    examples: int = 100,
) -> float:
    """Mean cross-entropy of the answers in nats, over validation problems of each number of hops.

    Problems of h hops are asked at loops(h) loops.
    """
    model.eval()
    losses = []
    for hop in hops:
        generator = torch.Generator().manual_seed(VALIDATION_SEED + hop)
        batch = task.sample(examples, hop, generator).to(model.device)
        out = model(batch.tokens, num_loops=loops(hop), last_only=True)
        losses.append(float(F.cross_entropy(out.logits[:, 0].float(), batch.answers())))
    return statistics.mean(losses)
