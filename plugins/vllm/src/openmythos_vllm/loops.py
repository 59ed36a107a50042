"""A number of loops per request: `SamplingParams(extra_args={"num_loops": 4})`.

Over HTTP the field is `vllm_xargs`. vLLM shows the parameters of the requests in a batch to logits
processors, before each pass. This one changes no logits; it keeps the loops of every row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor.builtin import process_dict_updates
from vllm.v1.sample.logits_processor.interface import BatchUpdate, LogitsProcessor

FIELD = "num_loops"


@dataclass(frozen=True)
class Limit:
    """What a request may ask for."""

    num_loops: int  # of the engine: the default and the most
    shares_prefixes: bool


# Of the engine made last in this process; None in a process that has made none.
_limit: Limit | None = None
# The requests' loops by row of the batch, for every engine that runs in this process.
_rows: dict[int, dict[int, int]] = {}


def limit_requests(num_loops: int, *, shares_prefixes: bool) -> None:
    """From now on requests may ask for 1 to num_loops loops; all of them if prefixes are shared."""
    global _limit
    _limit = Limit(num_loops, shares_prefixes)


def rows_of(vllm_config: VllmConfig) -> dict[int, int]:
    """The loops of the rows of an engine's batch, by row, where a request asks for a number."""
    return _rows.setdefault(id(vllm_config.model_config.hf_config), {})


class LoopsPerRequest(LogitsProcessor):
    """Keeps the loops of every row for the model."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise a ValueError, which is an HTTP 400, for a number that cannot be run."""
        asked = _asked(sampling_params)
        if asked is None:
            return
        if _limit is None:
            raise ValueError(
                f"{FIELD}: is known to models of openmythos, served by one API process, only"
            )
        most = _limit.num_loops
        if isinstance(asked, bool) or not isinstance(asked, int) or not 1 <= asked <= most:
            raise ValueError(f"{FIELD} = {asked!r}: must be a whole number, 1 to {most}")
        if asked != most and _limit.shares_prefixes:
            raise ValueError(
                f"{FIELD} = {asked}: must be {most}, that of the engine, while requests share "
                "prefixes; start it with --no-enable-prefix-caching"
            )

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.rows = rows_of(vllm_config)
        self.rows.clear()

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests that join, leave and change rows."""
        process_dict_updates(self.rows, batch_update, lambda params, *_: _asked(params))

    def apply(self, logits: Tensor) -> Tensor:
        """The logits, unchanged."""
        return logits

    def is_argmax_invariant(self) -> bool:
        """Yes: nothing changes."""
        return True


def _asked(params: SamplingParams) -> Any:
    return (params.extra_args or {}).get(FIELD)
