"""The model as transformers sees it: a backbone around the package's model, and a head.

An export contains this file and the parts of the package that it needs; see `export_bundle`.
"""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from openmythos.config import from_dict
from openmythos.hub import export_served
from openmythos.hub.export_cache import LoopCache
from openmythos.hub.export_config import OpenMythosConfig
from openmythos.model.config import MythosConfig
from openmythos.model.inputs import ModelInputs
from openmythos.model.mythos import OpenMythos
from openmythos.nn.facts import fills

# transformers 5.24 renamed the argument and the output field.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
_UNSUPPORTED = ("inputs_embeds", "output_attentions", "output_hidden_states")


def native_config(config: OpenMythosConfig) -> MythosConfig:
    """The model's config; the fields beside `native` take precedence."""
    return replace(
        from_dict(MythosConfig, config.native),
        vocab_size=config.vocab_size,
        context=config.max_position_embeddings,
        num_loops=config.num_loops,
        tie_embeddings=config.tie_word_embeddings,
    )


class OpenMythosPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the two classes share."""

    config_class = OpenMythosConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_attention_backend = True  # that of vLLM, see `export_served`
    _supports_sdpa = True  # the model chooses its own form of attention, which is like sdpa
    _no_split_modules = ("Block", "RecurrentBlock")

    def _init_weights(self, module: nn.Module) -> None:
        """Fill what a checkpoint lacks, and resized embeddings; transformers calls this."""
        own = dict(module.named_parameters(recurse=False))
        for name, fill in fills(module, zero_outputs=False).items():
            if name in own:
                fill(own[name], None)


class OpenMythosModel(OpenMythosPreTrainedModel):
    """Token ids -> hidden states after the final norm."""

    def __init__(self, config: OpenMythosConfig) -> None:
        super().__init__(config)
        # The head is outside the backbone.
        self.mythos = OpenMythos(replace(native_config(config), tie_embeddings=True))
        self.slots = export_served.attention_slots(self.mythos, config)
        if self.device.type != "meta" or self.slots:
            # `OpenMythos` has initialised them, or vLLM loads them: not for `_init_weights`.
            for parameter in self.mythos.parameters():
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        self.post_init()

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether the backward pass recomputes each loop instead of storing its activations."""
        return self.mythos.recurrent.checkpoint_loops

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.mythos.recurrent.checkpoint_loops = value

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, [vocab_size, dim]."""
        return self.mythos.embed

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding, perhaps by one of more tokens."""
        self.mythos.embed = value
        self.mythos.config = replace(self.mythos.config, vocab_size=value.num_embeddings)

    def new_cache(self, batch: int, capacity: int, num_loops: int | None = None) -> LoopCache:
        """A cache for `capacity` tokens, more if needed, and up to num_loops loops."""
        loops = self.config.num_loops if num_loops is None else num_loops
        return LoopCache(self.mythos.new_cache(batch, capacity, num_loops=loops))

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(  # noqa: PLR0913
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LoopCache | None = None,
        past_key_values: LoopCache | None = None,
        use_cache: bool | None = None,
        num_loops: int | None = None,
        last_only: bool = False,
        inputs_embeds: None = None,  # vLLM wants the name
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """last_hidden_state [batch, seq, dim], or [batch, 1, dim] with last_only.

        attention_mask [batch, seq], with a cache [batch, cached + seq]. position_ids [batch, seq]
        are read only without a cache: where they start again at 0, a packed document begins. A new
        cache is made only if use_cache is True.
        """
        _refuse({**kwargs, "inputs_embeds": inputs_embeds})
        if self.slots:
            assert position_ids is not None
            hidden = export_served.hidden_states(self.mythos, self.slots, input_ids, position_ids)
            return BaseModelOutputWithPast(last_hidden_state=hidden)
        kept = _given_cache(cache, past_key_values)
        if kept is None and use_cache:
            kept = self.new_cache(len(input_ids), 2 * input_ids.shape[1], num_loops)
        if kept is not None:
            kept.make_room(input_ids.shape[1])
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        inputs = ModelInputs.check(
            self.mythos.config,
            input_ids,
            self.training,
            num_loops=self.config.num_loops if num_loops is None else num_loops,
            attention_mask=attention_mask,
            documents=_documents(position_ids, input_ids) if kept is None else None,
            cache=None if kept is None else kept.native,
        )
        recurrence, router = self.mythos.run(inputs)
        hidden = self.mythos.hidden(recurrence.state, inputs, router, last_only=last_only)
        if kept is not None:
            kept.native.advance(input_ids.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: kept})


class OpenMythosForCausalLM(OpenMythosPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Token ids -> logits of the next token."""

    _tied_weights_keys = {"lm_head.weight": "model.mythos.embed.weight"}  # noqa: RUF012

    def __init__(self, config: OpenMythosConfig) -> None:
        super().__init__(config)
        self.model = OpenMythosModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding, [vocab_size, dim]."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Replace the embedding."""
        self.model.set_input_embeddings(value)

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(  # noqa: PLR0913
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        cache: LoopCache | None = None,
        past_key_values: LoopCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_loops: int | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits after num_loops loops, and with labels [batch, seq] the loss of the next tokens.

        logits_to_keep: the last n positions (0: all), or their indices. The loss is cross-entropy
        after the last loop, without the losses of routers and halting. See `OpenMythosModel` for
        the rest.
        """
        out = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=_given_cache(cache, past_key_values),
            use_cache=use_cache,
            num_loops=num_loops,
            last_only=isinstance(logits_to_keep, int) and logits_to_keep == 1,
            return_dict=True,
            **{name: kwargs.pop(name) for name in _UNSUPPORTED if name in kwargs},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = out.last_hidden_state[:, keep]
        logits = self.model.mythos.logits(hidden, self.lm_head)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(out, CACHE)})

    def _prepare_cache_for_generation(
        self,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a cache with room for all loops among the arguments of `forward`."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation = {generation_config.cache_implementation!r}: must be None, "
                "looped models have a cache of their own"
            )
        if not generation_config.use_cache or model_kwargs.get(CACHE) is not None:
            return
        rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
        # One more: candidates of assisted decoding are longer by one token.
        loops = model_kwargs.get("num_loops")
        model_kwargs[CACHE] = self.model.new_cache(rows, max_cache_length + 1, loops)


def _given_cache(cache: Any, past_key_values: Any) -> LoopCache | None:
    given = past_key_values if cache is None else cache
    if given is not None and not isinstance(given, LoopCache):
        raise ValueError(
            f"{CACHE}: must be None or what an earlier pass returned, is a {type(given).__name__}"
        )
    return given


def _documents(position_ids: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """Document numbers [batch, seq] if positions start again at 0 within a row, else None."""
    if position_ids is None or not bool((position_ids[:, 1:] == 0).any()):
        return None
    return (position_ids == 0).cumsum(dim=1).expand_as(input_ids)


def _refuse(kwargs: dict[str, Any]) -> None:
    for name in _UNSUPPORTED:
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise ValueError(f"{name}: is not supported by this model")
