"""Attention of the model's layers on keys and values that vLLM keeps.

A plane is the keys and values of one layer in one loop; every plane is an attention module of vLLM.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention

from openmythos.nn.latent_attention import LatentAttentionLayer
from openmythos.nn.layout import AttentionContext
from openmythos.nn.view import Project
from openmythos.types import KeyValues


class AbsorbedAttention(LatentAttentionLayer):
    """Latent attention that always attends to the latents: they are what vLLM keeps."""

    naive = LatentAttentionLayer.absorbed


@dataclass(frozen=True)
class SharedKeys:
    """Keys and values of a loop that reads what the first one has stored: none of its own."""

    nothing: Tensor  # [1, tokens, kv_width], not read

    def update(self, project: Project) -> KeyValues:
        """Nothing; `project` is not called."""
        return self.nothing


@dataclass(frozen=True)
class PlaneContext(AttentionContext):
    """Positions of the tokens of one pass, of several requests one after another.

    Each call of `attend` takes the next plane: layers run in order. `columns` are the tokens that
    still loop, of the `total` of the pass; None: all. vLLM's attention takes all of them: for the
    others it is given zeros, in planes that they never read.
    """

    planes: Iterator[nn.Module] = field(kw_only=True)
    total: int = field(kw_only=True)
    columns: Tensor | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """[1, heads, tokens, head_dim]; keys and values of the same tokens may have fewer heads."""
        plane = next(self.planes)
        assert isinstance(plane, Attention)
        size = plane.head_size
        flat = plane(*(self._padded(x, size) for x in (query, key, value)))
        out: Tensor = flat.view(self.total, -1, size)[..., : value.shape[-1]]
        if self.columns is not None:
            out = out[self.columns]
        return out.transpose(0, 1)[None]

    def pick(self, columns: Tensor, total: int) -> "PlaneContext":
        """The context of the tokens `columns` [1, picked] of those that have looped so far."""
        picked = columns[0]
        places = picked if self.columns is None else self.columns[picked]
        cos, sin = (None if x is None else x[:, :, picked] for x in (self.cos, self.sin))
        tokens = None if self.tokens is None else self.tokens[:, picked]
        return replace(
            self,
            positions=self.positions[:, picked],
            cos=cos,
            sin=sin,
            tokens=tokens,
            columns=places,
        )

    def _padded(self, x: Tensor, size: int) -> Tensor:
        """[1, heads, tokens, head_dim] as [total, heads * size]."""
        x = x[0].transpose(0, 1)
        if self.columns is None and x.shape[-1] == size:
            return x.reshape(self.total, -1)
        full = x.new_zeros(self.total, x.shape[1], size)
        tokens = slice(None) if self.columns is None else self.columns
        full[tokens, :, : x.shape[-1]] = x
        return full.view(self.total, -1)


def token_counts(starts: Tensor, total: int) -> list[int]:
    """How many of the `total` tokens of a pass belong to each row; `starts` are vLLM's, [rows + 1].

    Tokens after the last row are padding, a row of their own.
    """
    counts: list[int] = starts.diff().tolist()
    return [*counts, total - sum(counts)]


def loops_of_tokens(loops: list[int], counts: list[int], device: torch.device) -> Tensor:
    """The loops of each token, [tokens], from those of its row."""
    of_rows = torch.tensor(loops, device=device)
    return of_rows.repeat_interleave(torch.tensor(counts, device=device))
