"""Our models in lm-eval (the Language Model Evaluation Harness), without transformers.

Texts are encoded as `inference.text.Engine` does, with the start token first. That is also what
lm-eval's own class for transformers does with an export of the model.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos.config import ConfigError, needs
from openmythos.data.tokenizer import Tokenizer
from openmythos.inference.generation import Request, stream
from openmythos.inference.sampling import Sampling
from openmythos.model.mythos import OpenMythos

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    INSTALLED = True
except ImportError:
    TemplateLM, INSTALLED = object, False

MOST_NEW_TOKENS = 256
# (texts, ids of the context, ids of the continuation), as lm-eval makes them
Scored = tuple[Any, list[int], list[int]]


class Encoder(Protocol):
    """From text to ids and back."""

    @property
    def bos_id(self) -> int | None:
        """The start token, if there is one."""

    def encode(self, text: str) -> list[int]:
        """Ids, without the start token."""

    def decode(self, ids: Sequence[int]) -> str: ...


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model at a number of loops, as lm-eval asks for it."""

    def __init__(
        self,
        model: OpenMythos,
        encoder: Encoder | Tokenizer,
        *,
        num_loops: int | None = None,
        batch_size: int = 8,
    ) -> None:
        """`num_loops` may be changed later; None: the model's own."""
        if not INSTALLED:
            raise ConfigError(f"lm-eval {needs('eval')}")
        super().__init__()
        self.model, self.encoder, self.batch_size = model.eval(), encoder, batch_size
        self.num_loops = model.config.num_loops if num_loops is None else num_loops
        self._device = model.device

    @property
    def eot_token_id(self) -> int | None:
        """The start token, which also ends a text."""
        return self.encoder.bos_id

    @property
    def max_length(self) -> int:
        """The longest sequence, in tokens."""
        return self.model.context

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Ids, the start token first unless add_special_tokens is False."""
        bos = self.encoder.bos_id
        start = [] if bos is None or add_special_tokens is False else [bos]
        return [*start, *self.encoder.encode(string)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in windows of the model's context."""
        found = []
        for text in (request.args[0] for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.encoder.encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            scored = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(scored)))
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Scored], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding would produce it)."""
        # Requests with the same input, such as answers of one token, are computed once.
        asked = defaultdict(list)
        for index, (_, context, after) in enumerate(requests):
            if len(after) > self.max_length:
                longest = f"must be at most the context, {self.max_length}"
                raise ConfigError(f"tokens of a continuation = {len(after)}: {longest}")
            asked[_input(context, after, self.max_length)].append(index)
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        for given, rows in self._log_probabilities(asked):
            for index in asked[given]:
                ids = torch.tensor(requests[index][2], device=rows.device)
                last = rows[-len(ids) :]
                likely = last.gather(1, ids[:, None]).sum()
                found[index] = float(likely), bool((last.argmax(dim=-1) == ids).all())
        return found

    @torch.no_grad()
    def _log_probabilities(
        self, inputs: Iterable[tuple[int, ...]]
    ) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """Every different input with the log-probabilities of what follows, [length, vocab]."""
        ordered = sorted(inputs, key=lambda ids: (-len(ids), ids))
        for start in range(0, len(ordered), self.batch_size):
            batch = ordered[start : start + self.batch_size]
            # No mask: what follows a position changes nothing there.
            tokens = torch.zeros(len(batch), len(batch[0]), dtype=torch.long)
            for row, ids in zip(tokens, batch, strict=True):
                row[: len(ids)] = torch.tensor(ids)
            logits = self.model(tokens.to(self.model.device), num_loops=self.num_loops).logits
            logs = F.log_softmax(logits, dim=-1)
            yield from ((ids, rows[: len(ids)]) for ids, rows in zip(batch, logs, strict=True))

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """The continuation of every context, up to the first of its stopping texts."""
        return [self._continuation(*request.args) for request in requests]

    def _continuation(self, context: str, options: dict[str, Any]) -> str:
        until = options.get("until") or []
        until = [until] if isinstance(until, str) else until
        new = int(options.get("max_gen_toks", MOST_NEW_TOKENS))
        if new >= self.max_length:
            raise ConfigError(f"max_gen_toks = {new}: must be below the context, {self.max_length}")
        ids = self.tok_encode(context)[-(self.max_length - new) :]
        temperature = float(options.get("temperature", 0.0)) if options.get("do_sample") else 0.0
        request = Request(
            max_new_tokens=new,
            num_loops=self.num_loops,
            sampling=Sampling(temperature=temperature),
            stop_ids=() if self.encoder.bos_id is None else (self.encoder.bos_id,),
        )
        made: list[int] = []
        for step in stream(self.model, torch.tensor([ids]), request):
            made.append(int(step.tokens[0]))
            text = self.encoder.decode(made)
            if made[-1] in request.stop_ids or any(stop in text for stop in until):
                break
        text = self.encoder.decode(made)
        return text[: min((text.find(stop) for stop in until if stop in text), default=len(text))]


def _input(context: list[int], after: list[int], longest: int) -> tuple[int, ...]:
    """What the model reads to predict `after`: the last tokens that fit, without the very last."""
    return tuple((context + after)[-(longest + 1) : -1])


def evaluate(
    model: HarnessModel, tasks: Sequence[str], loops: Sequence[int], *, folder: str | None = None
) -> dict[str, dict[int, dict[str, float]]]:
    """The metrics of lm-eval's tasks by number of loops: found[task][loops][metric].

    `folder` holds tasks of one's own, such as `harness_tasks` writes.
    """
    manager = TaskManager(include_path=folder)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for count in loops:
        model.num_loops = count
        results = simple_evaluate(model, tasks=list(tasks), task_manager=manager)
        for task, metrics in results["results"].items():
            numbers = {
                name.removesuffix(",none"): float(value)
                for name, value in metrics.items()
                if isinstance(value, int | float) and name.endswith(",none")
            }
            found.setdefault(task, {})[count] = numbers
    return found
