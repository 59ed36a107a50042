"""What an engine is asked and what it answers: requests, events, limits."""

from dataclasses import dataclass, field
from typing import Literal

from openmythos.config import require, require_int, require_number
from openmythos.inference.contrast import NoContrast
from openmythos.inference.generation import Request
from openmythos.inference.sampling import TokenLogprobs as TokenLogprobs
from openmythos.nn.cache import ExactCache, FirstLoopCache
from openmythos.recurrence.exit_rules import FixedExit

FinishReason = Literal["stop", "length", "cancelled", "error"]
Phase = Literal["waiting", "prefill", "loop", "boundary", "ended"]
MOST_SAMPLES = 128
MOST_DRAFTED = 32


@dataclass(frozen=True, kw_only=True)
class Draft:
    """Self-speculation: draft `tokens` tokens with `loops` loops each, then check them together.

    The tokens of a request are the same with and without drafts. It pays where few rows are in
    flight and most of the final tokens are those of fewer loops.
    """

    loops: int = 1
    tokens: int = 4

    def __post_init__(self) -> None:
        require_int("draft.loops", self.loops, minimum=1)
        require_int("draft.tokens", self.tokens, minimum=1, maximum=MOST_DRAFTED)


@dataclass(frozen=True, kw_only=True)
class EngineRequest:
    """Token ids and how to continue them.

    `options` are those of `generation.stream`, which gives the same tokens for the prompt alone.
    `n` continuations are drawn; number i has the seed `options.sampling.seed` + i.

    `logprobs` = k: every token comes with its log-probability and the k most likely tokens; None:
    without. `prompt_logprobs` is the same for the tokens of the prompt. Log-probabilities are
    those of the model, before temperature and filters.
    """

    prompt: tuple[int, ...]
    options: Request = field(default_factory=Request)
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    draft: Draft | None = None

    def __post_init__(self) -> None:
        require(len(self.prompt) > 0, "prompt", self.prompt, "is empty; start with a token")
        require_int("n", self.n, minimum=1, maximum=MOST_SAMPLES)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), minimum=0)
        o = self.options
        require(o.latent_steps == 0, "latent_steps", o.latent_steps, "must be 0 in an engine")
        require(o.prefill_chunk == 0, "prefill_chunk", o.prefill_chunk, "is the engine's to choose")
        plain = isinstance(o.sampling.contrast, NoContrast)
        require(plain, "contrast.kind", o.sampling.contrast.kind, "must be none in an engine")
        if self.draft is not None:
            text = "needs the cache policies exact or first, and loops that no rule ends"
            exact = self.restartable and isinstance(o.exit_rule, FixedExit)
            require(exact, "draft", self.draft, text)
            require_int("draft.loops", self.draft.loops, minimum=1, maximum=o.num_loops - 1)

    @property
    def chunkable(self) -> bool:
        """Whether the prompt gives the same keys and values in one pass as in several."""
        rule = self.options.exit_rule
        alone = isinstance(rule, FixedExit) or rule.scope != "sequence"
        return alone and isinstance(self.options.prefill, ExactCache | FirstLoopCache)

    @property
    def restartable(self) -> bool:
        """Whether prompt and new tokens, read as one prompt, give the same keys and values."""
        return self.chunkable and self.options.prefill == self.options.decode

    def check(self, vocab_size: int, context: int) -> None:
        """Raise a ValueError unless a model with these sizes can answer the request."""
        o, size = self.options, len(self.prompt)
        inside = all(0 <= token < vocab_size for token in self.prompt)
        require(inside, "prompt", self.prompt, f"must hold token ids below {vocab_size}")
        text = f"and max_new_tokens = {o.max_new_tokens} exceed the context of {context}"
        require(size + o.max_new_tokens <= context, "prompt tokens", size, text)
        o.sampling.check(vocab_size)
        for stop_id in o.stop_ids:
            require_int("stop_ids", stop_id, minimum=0, maximum=vocab_size - 1)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                require_int(name, getattr(self, name), minimum=0, maximum=vocab_size)


@dataclass(frozen=True, kw_only=True)
class EngineLimits:
    """What an engine holds and does at a time.

    `max_rows` sequences are in flight. Keys and values are kept in `pages` pages of `page_tokens`
    tokens; a sequence takes one page per layer, loop and so many tokens. A step prefills at most
    `prefill_budget` token-loops (tokens times loops), but at least one token.

    Rows whose loops are done wait for each other before coda, head and the prelude of their next
    token: until they are more than `boundary_share` of the rows in flight, or one has waited for as
    many loops as a token of it has (at least `boundary_wait`), or no row loops.

    Tokens are drafted where a request asks for it and at most `draft_rows` rows are in flight.
    """

    max_rows: int = 32
    pages: int = 4096
    page_tokens: int = 16
    prefill_budget: int = 512
    boundary_share: float = 0.5
    boundary_wait: int = 2
    draft_rows: int = 4

    def __post_init__(self) -> None:
        for name in ("max_rows", "pages", "page_tokens", "prefill_budget", "boundary_wait"):
            require_int(name, getattr(self, name), minimum=1)
        require_int("draft_rows", self.draft_rows, minimum=0)
        require_number("boundary_share", self.boundary_share, at_least=0, at_most=1)


@dataclass(frozen=True, kw_only=True)
class PromptScored:
    """A prompt has been read: for every token its log-probability (first: None) and its loops.

    Sent once per request, before its first token, where `prompt_logprobs` were asked for.
    """

    request: int
    logprobs: tuple[TokenLogprobs | None, ...]
    loops: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class NewToken:
    """A token of continuation number `sample`, and the loops run for its logits.

    A stop token is sent too.
    """

    request: int
    sample: int
    token: int
    loops: int
    logprobs: TokenLogprobs | None = None


@dataclass(frozen=True, kw_only=True)
class Finished:
    """Continuation number `sample` has ended; no event of it follows.

    `new_tokens` were sent; `token_loops` is the sum of the loops of all positions computed for it,
    those of the prompt included where it read the prompt itself. `message` says what an error was.
    """

    request: int
    sample: int
    reason: FinishReason
    new_tokens: int
    token_loops: int
    message: str = ""


Event = PromptScored | NewToken | Finished


@dataclass(frozen=True, kw_only=True)
class RowInfo:
    """A sequence in an engine, for displays: it has run `loop` loops of its present token."""

    request: int
    sample: int
    phase: Phase
    loop: int
    num_loops: int
    prompt_tokens: int
    new_tokens: int


@dataclass(kw_only=True)
class EngineStats:
    """Counters since the engine was made, and what it holds now."""

    rows_waiting: int = 0
    rows_running: int = 0
    pages_used: int = 0
    pages_total: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    token_loops: int = 0
    preemptions: int = 0
    boundaries: int = 0
    boundary_rows: int = 0
    loop_steps: int = 0
    loop_rows: int = 0
    drafted: int = 0
    accepted: int = 0
