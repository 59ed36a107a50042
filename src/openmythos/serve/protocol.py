"""Requests of the OpenAI API with the extensions for loops, checked strictly.

Unknown fields are refused; fields of OpenAI that change no token are accepted by name. Extensions:
`num_loops`, `exit_rule`, `return_loops`, and `top_k`, `min_p`, `ignore_eos`.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue

from openmythos.config import from_dict
from openmythos.inference.sampling import Sampling
from openmythos.recurrence.exit_rules import ExitRule, FixedExit
from openmythos.serve.errors import unsupported

MOST_CHOICES, MOST_STOPS, LONGEST_STOP = 16, 16, 64
_INT64 = 2**63


def _encodable(text: str) -> str:
    """JSON can write half of a character, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("must be text that UTF-8 can encode") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Ids = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=1)]
StopText = Annotated[Text, Field(min_length=1, max_length=LONGEST_STOP)]


class _Strict(BaseModel):
    """Nothing is converted and nothing is ignored."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(_Strict):
    """Options of a stream; `include_usage` adds a last chunk with the usage."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class LoopOptions(_Strict):
    """How many loops, and when to leave earlier."""

    num_loops: Annotated[int, Field(ge=1)] | None = Field(
        None, description="Loops per token; the model's own number by default."
    )
    exit_rule: dict[str, JsonValue] | str | None = Field(
        None, description='A kind, "kl", or an object: {"kind": "kl", "threshold": 0.001}.'
    )

    def rule(self) -> ExitRule:
        """The exit rule; a ConfigError names a wrong field."""
        if self.exit_rule is None:
            return FixedExit()
        rule: ExitRule = from_dict(ExitRule, self.exit_rule, "exit_rule")
        return rule


class Generation(LoopOptions):
    """What completions and chat share."""

    model: str | None = None
    return_loops: bool = Field(False, description="Whether choices list the loops of each token.")
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    seed: Annotated[int, Field(ge=-_INT64, lt=_INT64)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=MOST_STOPS)] | None = None
    ignore_eos: bool = Field(False, description="Whether to go on after the end of a text.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, float] | None = None
    # They change no token here.
    user: str | None = None
    metadata: dict[str, JsonValue] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def stops(self) -> tuple[str, ...]:
        """The texts at which a choice ends."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling(self, seed: int) -> Sampling:
        """How tokens are drawn, `seed` being that of a request without one."""
        return Sampling(
            temperature=1.0 if self.temperature is None else float(self.temperature),
            top_p=1.0 if self.top_p is None else float(self.top_p),
            top_k=self.top_k or 0,
            min_p=float(self.min_p or 0.0),
            seed=(seed if self.seed is None else self.seed) % _INT64,
        )

    def refuse_unsupported(self) -> None:
        """Raise an ApiError for an option of OpenAI that would change the text and is not there."""
        for name in ("presence_penalty", "frequency_penalty", "logit_bias"):
            if getattr(self, name):
                raise unsupported(name, "is not implemented; leave it out")
        if self.stream_options is not None and not self.stream:
            raise unsupported("stream_options", 'is only for a request with "stream": true')


class CompletionRequest(Generation):
    """POST /v1/completions."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1)]
        | Annotated[list[Ids], Field(min_length=1)]
    ) = Field("", description="A text, token ids, or a list of either.")
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    suffix: str | None = None

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        given: Any = self.prompt
        single = isinstance(given, str) or isinstance(given[0], int)
        return [given] if single else list(given)

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        if self.suffix:
            raise unsupported("suffix", "is not implemented; leave it out")
        if self.best_of not in (None, self.n or 1):
            raise unsupported("best_of", "must equal n")


class TextPart(_Strict):
    """A piece of a chat message."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """A message of a chat; only text is read."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], Field(min_length=1)] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    refusal: str | None = None

    def text(self) -> str:
        """The content as one text."""
        if self.content is None or isinstance(self.content, str):
            return self.content or ""
        return "".join(part.text for part in self.content)


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: dict[str, JsonValue] | None = None
    tools: list[JsonValue] | None = None
    tool_choice: JsonValue = None
    parallel_tool_calls: bool | None = None
    functions: list[JsonValue] | None = None
    function_call: JsonValue = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: list[str] | None = None

    def refuse_unsupported(self) -> None:
        super().refuse_unsupported()
        for name in ("tools", "functions", "reasoning_effort", "verbosity"):
            if getattr(self, name):
                raise unsupported(name, "is not implemented; leave it out")
        for name in ("tool_choice", "function_call"):
            if getattr(self, name) not in (None, "none", "auto"):
                raise unsupported(name, "is not implemented; leave it out")
        if self.response_format is not None and self.response_format != {"type": "text"}:
            raise unsupported("response_format", 'must be {"type": "text"}')
        if self.modalities not in (None, ["text"]):
            raise unsupported("modalities", 'must be ["text"]')
        if self.top_logprobs is not None and not self.logprobs:
            raise unsupported("top_logprobs", 'needs "logprobs": true')


class TokenizeRequest(_Strict):
    """POST /tokenize."""

    prompt: Text
    model: str | None = None
    add_special_tokens: bool = True


class DetokenizeRequest(_Strict):
    """POST /detokenize."""

    tokens: list[Annotated[int, Field(ge=0, lt=2**31)]]
    model: str | None = None


class LoopsRequest(LoopOptions):
    """POST /v1/loops: what the model would say after each loop, at every position of a prompt."""

    model: str | None = None
    prompt: Text | Ids = ""
    top: Annotated[int, Field(ge=1, le=20)] = Field(5, description="Most likely tokens to list.")
    last_only: bool = Field(False, description="Whether to tell of the last position alone.")


def field_names(request: type[BaseModel]) -> dict[str, list[str]]:
    """The names of the fields of a request, for hints at typos."""
    nested = {"stream_options": list(StreamOptions.model_fields)}
    return {"": list(request.model_fields), **nested}
