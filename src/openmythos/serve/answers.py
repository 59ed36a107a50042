"""Responses of the OpenAI API, with the extensions for loops."""

from typing import Any, Literal

from pydantic import BaseModel

Reason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorDetail


class Usage(BaseModel):
    """Tokens of a request; `token_loops` is the sum of the loops of all positions computed."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    token_loops: int = 0


class CompletionLogprobs(BaseModel):
    """Log-probabilities of each token; `top_logprobs` are keyed by the text of the likely token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """`loops` has the loops run for each token, where they were asked for."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Reason | None = None
    loops: list[int] | None = None
    token_ids: list[int] | None = None


class Completion(BaseModel):
    """An answer of /v1/completions, or a chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class ChatText(BaseModel):
    """A message, or what is new of it in a chunk."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: ChatText
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    loops: list[int] | None = None
    token_ids: list[int] | None = None


class ChatDelta(BaseModel):
    index: int
    delta: ChatText
    logprobs: ChatLogprobs | None = None
    finish_reason: Reason | None = None
    loops: list[int] | None = None
    token_ids: list[int] | None = None


class Chat(BaseModel):
    """An answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None


class ChatChunk(BaseModel):
    """A chunk of a stream of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatDelta]
    usage: Usage | None = None


class Model(BaseModel):
    """A served model; `num_loops` is its own number of loops, `max_loops` the most served.

    `task` tells a model that was trained on a task what it can be asked.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "openmythos"
    num_loops: int
    max_loops: int
    context: int
    vocab_size: int
    parameters: int
    has_chat: bool = False
    task: dict[str, Any] | None = None


class Models(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Tokens(BaseModel):
    """`texts` has the text of each token."""

    count: int
    max_model_len: int
    tokens: list[int]
    texts: list[str]


class Text(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    """What lm-eval asks of a tokenizer."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None = None
    chat_template: str | None


class LoopTop(BaseModel):
    """A likely token."""

    id: int
    token: str
    prob: float


class LoopView(BaseModel):
    """What the model says after a loop.

    `change` is |h' - h| / |h'| of the state, `kl` the divergence KL(p || p of the loop before) and
    `kl_last` KL(p of the last loop || p), in nats; `entropy` of p in nats. The first loop has
    neither `change` nor `kl`.
    """

    loop: int
    top: list[LoopTop]
    entropy: float
    change: float | None
    kl: float | None
    kl_last: float


class LoopPosition(BaseModel):
    """A position of the prompt: its token, the loops it ran, and what came after each."""

    position: int
    id: int
    token: str
    loops_used: int
    loops: list[LoopView]


class Loops(BaseModel):
    """An answer of /v1/loops."""

    model: str
    num_loops: int
    positions: list[LoopPosition]


class Row(BaseModel):
    """A sequence in an engine: it has run `loop` of `num_loops` loops of its present token."""

    replica: int
    request: str
    sample: int
    phase: str
    loop: int
    num_loops: int
    prompt_tokens: int
    new_tokens: int


class EngineView(BaseModel):
    """What all replicas hold now."""

    rows: list[Row]
    rows_running: int
    rows_waiting: int
    pages_used: int
    pages_total: int


class ReplicaHealth(BaseModel):
    replica: int
    state: str
    restarts: int


class Health(BaseModel):
    status: Literal["ok", "degraded", "starting", "draining", "unhealthy"]
    replicas: list[ReplicaHealth]


class Version(BaseModel):
    version: str
