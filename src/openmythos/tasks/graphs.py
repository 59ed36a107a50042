"""Reachability in random graphs, after ProsQA (arXiv 2412.06769)."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from openmythos.config import require_int
from openmythos.tasks.batch import IGNORE, TaskBatch, permutations


@dataclass(frozen=True, kw_only=True)
class Reachability:
    """u_1 v_1 ... u_m v_m ? s a b -> the one of a and b that edges lead to from s.

    Two trees grow over the nodes, one from s; the right candidate lies exactly `hops` edges below
    s, the wrong one as deep in the other tree, and every node carries a random name. So depth
    and degree do not give the answer away. Edges come in random order.
    """

    kind: Literal["reachability"] = "reachability"
    num_nodes: int = 24
    num_names: int = 32

    def __post_init__(self) -> None:
        require_int("num_nodes", self.num_nodes, minimum=4)
        require_int("num_names", self.num_names, minimum=self.num_nodes)

    @property
    def vocab_size(self) -> int:
        """Names and the question mark."""
        return self.num_names + 1

    def sample(self, batch: int, hops: int, generator: torch.Generator) -> TaskBatch:
        """`batch` graphs whose answer lies exactly `hops` edges from the start."""
        return self.solved(batch, hops, generator)[0]

    def solved(self, batch: int, hops: int, generator: torch.Generator) -> tuple[TaskBatch, Tensor]:
        """The same problems, and the nodes on the way to the answer [batch, hops]."""
        half = self.num_nodes // 2
        require_int("hops", hops, minimum=1, maximum=half - 1)
        names = permutations(batch, self.num_names, generator)
        # Node 0 ... hops of a tree are the path; the others hang off any earlier node.
        parent = (torch.rand(batch, 2, half, generator=generator) * torch.arange(half)).long()
        parent[:, :, 1 : hops + 1] = torch.arange(hops)
        child = torch.arange(half).expand(batch, 2, half)
        offset = torch.tensor([[0], [half]])
        edges = torch.stack((parent + offset, child + offset), dim=3)[:, :, 1:].flatten(1, 2)
        order = permutations(batch, edges.shape[1], generator)
        edges = edges.gather(1, order[:, :, None].expand(-1, -1, 2)).flatten(1)
        candidates = names[:, [hops, half + hops]]
        swap = torch.rand(batch, 1, generator=generator) < 0.5
        candidates = torch.where(swap, candidates.flip(1), candidates)
        ask = torch.full((batch, 1), self.num_names)
        tokens = torch.cat((names.gather(1, edges), ask, names[:, :1], candidates), dim=1)
        answers = torch.full_like(tokens, IGNORE)
        answers[:, -1] = names[:, hops]
        last = torch.full((batch,), tokens.shape[1] - 1)
        return TaskBatch(tokens, answers, last), names[:, 1 : hops + 1]
