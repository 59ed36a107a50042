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
from openmythos.nn.pages import Batch, Planes


def draft_and_verify(
    runner: Runner, rows: Sequence[Continuation], tokens: int
) -> tuple[Tensor, list[list[int]]]:
    """(logits [tokens + 1, rows, vocab] after all loops, `tokens` drafted ids of each row).

    The rows have the same draft settings and num_loops, and pages for `tokens` more tokens. Row k
    of the logits is right for a row if its first k drafts are what it draws.
    """
    draft = rows[0].asked.draft
    assert draft is not None
    stages = runner.stages
    how = [(row.asked.options.sampling, _copied(row.generator)) for row in rows]
    ids = [[row.ids[row.cached]] for row in rows]
    states, terms = [], []
    for place in range(tokens + 1):
        positions = [row.cached + place for row in rows]
        batch = runner.batch_of(rows, positions, [own[-1] for own in ids])
        state, inputs = stages.encode(batch.planes([0] * len(rows)))
        for loop in range(draft.loops):
            state = stages.loop(state, inputs, [loop] * len(rows), _planes(batch, rows, loop))
        states.append(state)
        terms.append(inputs.drive.input_term)
        if place < tokens:
            planes = batch.planes([row.plane_map.coda for row in rows])
            drawn = sample_rows(stages.read_out(stages.output(state), planes), how)
            for own, token in zip(ids, drawn, strict=True):
                own.append(0 if token is None else token)  # not finite: nor are the final logits
    every = [row for _ in range(tokens + 1) for row in rows]
    positions = [row.cached + place for place in range(tokens + 1) for row in rows]
    batch = runner.batch_of(every, positions, [own[k] for k in range(tokens + 1) for own in ids])
    state = states[0].map(lambda *x: torch.cat(x), *states[1:])
    drive = inputs.drive._replace(input_term=torch.cat(terms))
    inputs = replace(inputs, drive=drive)
    for loop in range(draft.loops, rows[0].num_loops):
        state = stages.loop(state, inputs, [loop] * len(every), _planes(batch, every, loop))
    planes = batch.planes([row.plane_map.coda for row in every])
    logits = stages.read_out(stages.output(state), planes)
    return logits.view(tokens + 1, len(rows), -1), [own[1:] for own in ids]


def _planes(batch: Batch, rows: Sequence[Continuation], loop: int) -> Planes:
    maps = [row.plane_map for row in rows]
    return batch.planes([x.recurrent[loop] for x in maps], [x.writes[loop] for x in maps])


def _copied(generator: torch.Generator) -> torch.Generator:
    copy = torch.Generator("cpu")
    copy.set_state(generator.get_state())
    return copy
