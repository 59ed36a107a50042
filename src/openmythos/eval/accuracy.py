"""Accuracy on a task, by hops and by loops."""

import statistics
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from openmythos.eval.likelihood import logits_by_loops
from openmythos.inference.generation import DecodableModel, Request, stream
from openmythos.machine import autocast, choose_precision
from openmythos.model.mythos import OpenMythos
from openmythos.tasks import Task
from openmythos.tasks.reasoning import Thoughts
from openmythos.types import NextTokenIds, TokenIds

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
    thoughts: Thoughts | None = None,
    examples: int = 400,
    precision: str = "fp32",
) -> dict[int, dict[int, float]]:
    """Accuracy at h hops after T loops, as found[h][T].

    One pass gives all T, but a model that has `thoughts` generates them for every T.
    """
    model.eval()
    found: dict[int, dict[int, float]] = {}
    for hop in hops:
        generator = torch.Generator().manual_seed(ASKED_SEED + hop)
        batch = task.sample(examples, hop, generator).to(model.device)
        with autocast(choose_precision(precision, model.device), model.device):
            if thoughts is None or thoughts.kind == "none":
                logits = logits_by_loops(model, batch.tokens, loops, last_only=True)
                given = {loop: after[:, 0].argmax(dim=-1) for loop, after in logits.items()}
            else:
                asked = (model, task, thoughts, batch.tokens, hop)
                given = {loop: answers(*asked, num_loops=loop) for loop in loops}
        right = batch.answers()
        found[hop] = {loop: float((own == right).float().mean()) for loop, own in given.items()}
    return found


def answers(
    model: DecodableModel,
    task: Task,
    thoughts: Thoughts,
    tokens: TokenIds,
    hops: int,
    *,
    num_loops: int,
) -> NextTokenIds:
    """The model's answers to questions of so many hops, after thoughts of its own, greedily."""
    request = Request(
        num_loops=num_loops,
        max_new_tokens=thoughts.new_tokens(hops),
        latent_steps=thoughts.latent_steps(hops),
    )
    *_, last = stream(model, thoughts.asked(tokens, hops, task.vocab_size), request)
    return last.tokens


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
