"""A model whose decoding steps are compiled: `stream(CompiledModel(model), prompt, request)`."""

import logging
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from openmythos import machine
from openmythos.inference.contrast import Contrast
from openmythos.inference.decode import Run, Step, shows_its_parts, unsupported
from openmythos.inference.generation import DecodableModel
from openmythos.inference.graphs import Captured, Compiled, fingerprint, weights_of
from openmythos.kernels import step_form
from openmythos.nn.cache import CachePolicy, KVCache
from openmythos.recurrence.exit_rules import ExitRule
from openmythos.types import LoopCounts, Mask, NextLogits, TokenIds

LOGGER = logging.getLogger(__name__)


class CompiledModel:
    """Prefill as the model itself; then steps of one token, compiled (CPU) or as CUDA graphs.

    It is a `DecodableModel` in the place of the model. The first step compiles, which takes a
    minute or so, and keeps the code in `folder` for other processes. What the step does not cover
    is computed by the model as ever, after one log line. In-place changes of the weights are seen
    at once, other changes of the model by the next prompt.
    """

    def __init__(
        self,
        model: DecodableModel,
        folder: Path | None = None,
        say: Callable[[str], None] = LOGGER.info,
    ) -> None:
        """`say` gets a line before each compilation, and the reason where there is none."""
        self.model, self._say = model, say
        self._folder = folder
        self._made_for: Any = None
        self._run: Run | str = ""
        self._steps: weakref.WeakKeyDictionary[KVCache, Step] = weakref.WeakKeyDictionary()
        self._refused: set[str] = set()
        self._idle: dict[Any, list[KVCache]] = {}

    @property
    def vocab_size(self) -> int:
        return self.model.vocab_size

    @property
    def context(self) -> int:
        return self.model.context

    @property
    def device(self) -> torch.device:
        return self.model.device

    def new_cache(
        self,
        batch: int,
        capacity: int,
        *,
        num_loops: int,
        prefill: CachePolicy,
        decode: CachePolicy,
    ) -> KVCache:
        def made(size: int) -> KVCache:
            return self.model.new_cache(
                batch, size, num_loops=num_loops, prefill=prefill, decode=decode
            )

        if step_form(self.device) != "captured":
            return made(capacity)
        # A captured graph holds the addresses of its cache: they are used again.
        size = -(-capacity // Captured.bucket) * Captured.bucket
        idle = self._idle.setdefault((batch, size, num_loops, prefill, decode), [])
        kept = idle.pop() if idle else made(size)
        cache = kept.emptied()
        weakref.finalize(cache, idle.append, kept)
        return cache

    def next_logits(
        self,
        tokens: TokenIds,
        *,
        num_loops: int,
        exit_rule: ExitRule,
        attention_mask: Mask | None,
        cache: KVCache,
        contrast: Contrast,
        latent: bool = False,
    ) -> tuple[NextLogits, LoopCounts]:
        """As the model's own."""
        follows = cache.length > 0 and tokens.shape[1] == 1 and attention_mask is None
        if follows and not latent:
            step = self._step(cache, num_loops, exit_rule, contrast)
            if step is not None:
                return step(tokens[:, 0], cache)
        return self.model.next_logits(
            tokens,
            num_loops=num_loops,
            exit_rule=exit_rule,
            attention_mask=attention_mask,
            cache=cache,
            contrast=contrast,
            latent=latent,
        )

    def _step(
        self, cache: KVCache, num_loops: int, rule: ExitRule, contrast: Contrast
    ) -> Step | None:
        """The step on this cache; None, after one log line for each reason, if there is none."""
        step, model = self._steps.get(cache), self.model
        reason = unsupported(rule, contrast)
        if step is not None and not reason and step.fits(cache, num_loops, rule):
            return step
        run = None if reason else self._runner()
        if isinstance(run, str):
            reason = run
        elif run is not None and shows_its_parts(model):
            step = self._steps[cache] = Step(model, cache, num_loops, rule, run)
            return step
        if reason not in self._refused:
            self._say(f"decoding is not compiled: {reason or 'the model does not show its parts'}")
        self._refused.add(reason)
        return None

    def _runner(self) -> Run | str:
        """What runs the regions, anew where the model is not as it was; or why nothing can."""
        if not isinstance(self.model, nn.Module):
            return f"{type(self.model).__name__} is no module"
        types = {type(x) for x in weights_of(self.model).values()} - {Tensor, nn.Parameter}
        if types:
            return f"a weight is a {types.pop().__name__}"
        form = step_form(self.device)
        found = (form, fingerprint(self.model))
        if found != self._made_for:
            self._made_for, self._run = found, f"there is no compiled form on {self.device}"
            if form == "compiled":
                self._run = Compiled(self._folder or machine.cache_folder(), self._say)
            elif form == "captured":
                self._run = Captured()
        return self._run
