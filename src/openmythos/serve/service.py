"""What all routes share: the served model, its tokenizer, the replicas, the limits."""

import secrets
import time
from dataclasses import dataclass, field
from pathlib import Path

from openmythos.config import ConfigError, require
from openmythos.data.tokenizer import Vocabulary
from openmythos.inference.generation import Request
from openmythos.inference.request import EngineRequest
from openmythos.model.config import MythosConfig
from openmythos.planning import cost
from openmythos.serve.answers import Model
from openmythos.serve.chat import ChatTemplate
from openmythos.serve.errors import ApiError, of_config
from openmythos.serve.limits import ServerLimits
from openmythos.serve.metrics import Metrics
from openmythos.serve.protocol import Generation, LoopOptions
from openmythos.serve.replicas import Replicas
from openmythos.serve.source import Served


@dataclass
class Service:
    """One served model."""

    served: Served
    replicas: Replicas
    limits: ServerLimits
    name: str
    chat: ChatTemplate | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics = Metrics(self.replicas)
        self.config: MythosConfig = self.served.source.config
        self.tokenizer: Vocabulary = self.served.tokenizer
        config, tokenizer = self.config.vocab_size, self.tokenizer.vocab_size
        allowed = f"must be at most the {config} tokens of the model"
        require(tokenizer <= config, "tokenizer.vocab_size", tokenizer, allowed)
        parameters = cost.parameters(self.config).total
        self.model = Model(
            id=self.name,
            created=self.created,
            num_loops=self.config.num_loops,
            max_loops=max(self.limits.max_loops, self.config.num_loops),
            context=self.config.context,
            vocab_size=tokenizer,
            parameters=parameters,
            has_chat=self.chat is not None,
            task=self.served.task_facts(),
        )

    @classmethod
    def open(
        cls,
        served: Served,
        replicas: Replicas,
        limits: ServerLimits,
        *,
        name: str = "",
        chat_template: str = "",
    ) -> "Service":
        """The service of a model; a ConfigError if it has no tokenizer."""
        text = "is for a language model; this one was trained on a task"
        require(not (served.trained and chat_template), "chat_template", chat_template, text)
        path = served.source.path
        template = None if served.trained else ChatTemplate.find(Path(path), chat_template)
        return cls(served, replicas, limits, name or served.name, template)

    def require_model(self, name: str | None) -> None:
        """Raise an ApiError for a model that is not served."""
        if name is not None and name != self.name:
            text = f"model {name[:200]!r} is not served here; there is {self.name!r}"
            raise ApiError(404, text, param="model", code="model_not_found")

    def loops(self, asked: LoopOptions) -> int:
        """The number of loops of a request."""
        loops = self.config.num_loops if asked.num_loops is None else asked.num_loops
        if loops > self.model.max_loops:
            text = f"num_loops = {loops}: must be at most {self.model.max_loops} on this server"
            raise ApiError(400, text, param="num_loops", code="invalid_value")
        return loops

    def require_room_for_loops(self, ids: list[int], loops: int, *, last_only: bool) -> None:
        """Raise an ApiError for a prompt too long to keep what follows each of its loops."""
        positions, limits = 1 if last_only else len(ids), self.limits
        rows = loops * positions
        values = rows * self.config.vocab_size + loops * len(ids) * self.config.dim
        if rows > limits.max_loop_rows or values > limits.max_loop_values:
            text = f"prompt: {len(ids)} tokens at {loops} loops are more than this server keeps; "
            text += "send fewer tokens, ask for fewer loops, or set last_only"
            raise ApiError(400, text, param="prompt", code="invalid_value")

    def prompt_ids(self, prompt: str | list[int]) -> list[int]:
        """The ids of a prompt, within vocabulary and context."""
        try:
            ids = self.tokenizer.prompt_ids(prompt) if isinstance(prompt, str) else prompt
        except ConfigError as error:
            raise ApiError(400, str(error), param="prompt", code="invalid_value") from error
        context, vocab = self.config.context, self.config.vocab_size
        if len(ids) > context:
            text = f"prompt: has {len(ids)} tokens, the context of the model is {context}"
            raise ApiError(400, text, param="prompt", code="context_length_exceeded")
        if max(ids) >= vocab:
            text = f"prompt: holds the token {max(ids)}, must hold ids below {vocab}"
            raise ApiError(400, text, param="prompt", code="invalid_value")
        return ids

    def request(
        self,
        asked: Generation,
        ids: list[int],
        max_new_tokens: int | None,
        logprobs: int | None,
        *,
        echo: bool = False,
    ) -> EngineRequest:
        """A prompt in the engine's terms; more tokens than fit into the context are not made."""
        loops = self.loops(asked)
        room = self.config.context - len(ids)
        wanted = room if max_new_tokens is None else max_new_tokens
        if wanted and not room and not echo:
            text = f"prompt: has {len(ids)} tokens, which leaves no room for new ones"
            raise ApiError(400, text, param="prompt", code="context_length_exceeded")
        if max_new_tokens is not None and max_new_tokens > self.limits.max_new_tokens:
            text = f"max_tokens = {max_new_tokens}: must be at most {self.limits.max_new_tokens}"
            raise ApiError(400, text, param="max_tokens", code="invalid_value")
        try:
            options = Request(
                max_new_tokens=min(wanted, room, self.limits.max_new_tokens),
                num_loops=loops,
                sampling=asked.sampling(secrets.randbits(62)),
                exit_rule=asked.rule(),
                stop_ids=() if asked.ignore_eos else self.tokenizer.stop_ids,
            )
            request = EngineRequest(
                prompt=tuple(ids),
                options=options,
                n=asked.n or 1,
                logprobs=logprobs,
                prompt_logprobs=logprobs if echo else None,
            )
            request.check(self.config.vocab_size, self.config.context)
        except ConfigError as error:
            raise of_config(error) from error
        return request
