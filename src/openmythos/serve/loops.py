"""What a model says after every loop of a prompt: the logit lens, and how the state settles."""

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.model.mythos import OpenMythos
from openmythos.recurrence.exit_rules import FixedExit
from openmythos.serve.jobs import Look, LoopRow, LoopTable

_SMALLEST = torch.finfo(torch.float32).tiny


@torch.no_grad()
def look(model: OpenMythos, asked: Look) -> LoopTable:
    """One pass over the prompt that keeps logits and states after every loop.

    A position that an exit rule stopped has as many rows as it ran loops.
    """
    tokens = torch.tensor([asked.prompt], device=model.device)
    rule = None if isinstance(asked.exit_rule, FixedExit) else asked.exit_rule
    every = tuple(range(1, asked.num_loops + 1))
    out = model(
        tokens,
        num_loops=asked.num_loops,
        exit_rule=rule,
        collect_loops=every,
        last_only=asked.last_only,
    )
    used = out.recurrence.loops_used[0].tolist()
    at = slice(-1, None) if asked.last_only else slice(None)
    log_p = torch.stack([F.log_softmax(out.loop_logits[n][0, at].float(), dim=-1) for n in every])
    states = torch.stack([out.recurrence.states[n][0, at].float() for n in every])
    table = _rows(log_p, states, min(asked.top, model.vocab_size))
    positions = tuple(rows[:ran] for rows, ran in zip(table, used[at], strict=True))
    return LoopTable(tuple(used[at]), positions)


def _rows(log_p: Tensor, states: Tensor, top: int) -> list[tuple[LoopRow, ...]]:
    """Per position its rows, of log-probabilities [loops, seq, vocab] and states [.., dim]."""
    p = log_p.exp()
    values, ids = p.topk(top, dim=-1)
    entropy = -(p * log_p).sum(dim=-1)
    kl = (p[1:] * (log_p[1:] - log_p[:-1])).sum(dim=-1).clamp_min(0)
    kl_last = (p[-1] * (log_p[-1] - log_p)).sum(dim=-1).clamp_min(0)
    change = (states[1:] - states[:-1]).norm(dim=-1) / states[1:].norm(dim=-1).clamp_min(_SMALLEST)
    found = []
    for place in range(p.shape[1]):
        first = [None]  # the first loop has none before it
        rows = zip(
            zip(ids[:, place].tolist(), values[:, place].tolist(), strict=True),
            entropy[:, place].tolist(),
            [*first, *change[:, place].tolist()],
            [*first, *kl[:, place].tolist()],
            kl_last[:, place].tolist(),
            strict=True,
        )
        found.append(
            tuple(LoopRow(tuple(zip(*top_, strict=True)), *others) for top_, *others in rows)
        )
    return found
