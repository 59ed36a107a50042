"""Self-speculation: draft tokens with fewer loops, then run the other loops of all of them at once.

    draft    for t_0 (known), t_1 ... t_K: prelude, loops 1 to d, coda; t_{k+1} from its logits
    verify   loops d+1 to D of t_0 ... t_K in one batch, coda, head; keep tokens up to the first
             that the full logits do not give

Loop t of a token reads only loops up to t of earlier ones (cache policies exact and first), so that
the first d loops of a drafted token are its own, and nothing of them is computed twice. The drafts
are drawn with a copy of the request's generator: they agree with the final draw wherever the two
distributions do, and the tokens are those of the request without drafts, for the same seed.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from openmythos.inference.runner import Continuation, Runner
from openmythos.inference.sampling import sample_rows


def draft_and_verify(
    runner: Runner, rows: Sequence[Continuation], tokens: int
) -> tuple[Tensor, list[list[int]]]:
    """(logits [tokens + 1, rows, vocab] after all loops, `tokens` drafted ids of each row).

    The rows have the same draft settings and num_loops, and pages for `tokens` more tokens. Row k
    of the logits is right for a row if its first k drafts are what it draws.
    """
    draft = rows[0].asked.draft
    assert draft is not None
    stages, (prelude, recurrent, coda) = runner.stages, runner.stages.layers
    how = [(row.asked.options.sampling, _copied(row.generator)) for row in rows]
    ids = [[row.ids[row.cached]] for row in rows]
    states, terms = [], []
    for place in range(tokens + 1):
        positions = [row.cached + place for row in rows]
        context = runner.context_of([own[-1] for own in ids], positions)
        lookup = runner.lookup_of(rows, positions)
        state, inputs = stages.encode(context, lookup.views([0] * len(rows), prelude))
        for loop in range(draft.loops):
            views = lookup.views(*_planes(rows, loop, recurrent))
            state = stages.loop(state, inputs, loop, views)
        states.append(state)
        terms.append(inputs.drive.input_term)
        if place < tokens:
            views = lookup.views([row.plane_map.coda for row in rows], coda)
            drawn = sample_rows(stages.read_out(stages.output(state), context, views), how)
            for own, token in zip(ids, drawn, strict=True):
                own.append(0 if token is None else token)  # not finite: nor are the final logits
    every = [row for _ in range(tokens + 1) for row in rows]
    positions = [row.cached + place for place in range(tokens + 1) for row in rows]
    context = runner.context_of([own[k] for k in range(tokens + 1) for own in ids], positions)
    lookup = runner.lookup_of(every, positions)
    state = states[0].map(lambda *x: torch.cat(x), *states[1:])
    drive = inputs.drive._replace(input_term=torch.cat(terms))
    inputs = replace(inputs, context=context, drive=drive)
    for loop in range(draft.loops, rows[0].num_loops):
        state = stages.loop(state, inputs, loop, lookup.views(*_planes(every, loop, recurrent)))
    views = lookup.views([row.plane_map.coda for row in every], coda)
    logits = stages.read_out(stages.output(state), context, views)
    return logits.view(tokens + 1, len(rows), -1), [own[1:] for own in ids]


def _planes(
    rows: Sequence[Continuation], loop: int, layers: int
) -> tuple[list[int], int, list[bool]]:
    maps = [row.plane_map for row in rows]
    return [x.recurrent[loop] for x in maps], layers, [x.writes[loop] for x in maps]


def _copied(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator("cpu")
    copy.set_state(generator.get_state())
    return copy
