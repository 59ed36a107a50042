"""The config of an exported model, as `transformers` sees it.

An export contains this file. transformers loads it twice, under two module names, so it imports
nothing of the model's code.
"""

from typing import Any

from transformers import PreTrainedConfig


class OpenMythosConfig(PreTrainedConfig):  # type: ignore[misc]
    """`native` is the config of the model as openmythos writes it, a nested dict.

    The fields that transformers and its users read are beside it and take precedence: `num_loops`
    is the default number of loops, `vocab_size` and `max_position_embeddings` the sizes, and
    `tie_word_embeddings` says whether the head is the embedding. `num_hidden_layers` follows from
    `native` and `num_loops` and cannot be set.
    """

    model_type = "openmythos"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    def __init__(
        self,
        native: dict[str, Any] | None = None,
        num_loops: int = 4,
        vocab_size: int = 257,
        hidden_size: int = 256,
        num_attention_heads: int = 4,
        max_position_embeddings: int = 1024,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.native = {} if native is None else native
        self.num_loops = num_loops
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.tie_word_embeddings = tie_word_embeddings
        self.use_cache = use_cache
        kwargs.pop("num_hidden_layers", None)  # in older exports
        super().__init__(**kwargs)

    @property
    def num_hidden_layers(self) -> int:
        """How many layers run, each with a cache of its own: those of the loop once per loop."""
        prelude, recurrent, coda = (
            self.native.get(f"{part}_layers", 1) for part in ("prelude", "recurrent", "coda")
        )
        return int(prelude + recurrent * self.num_loops + coda)
