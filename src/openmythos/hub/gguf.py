"""GGUF files of Llama and Qwen3 (package ``gguf``): read only, quantised weights as fp32."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmythos.config import ConfigError, needs
from openmythos.data.tokenizer import Tokenizer
from openmythos.hub.fields import Fields
from openmythos.hub.format import BARE, ONE_LOOP, Format, attention_sizes, swiglu
from openmythos.hub.rules import Rule, interleaved, same, stacked, under
from openmythos.hub.tokenizer import PublicTokenizer, byte_level_bpe
from openmythos.model.config import MythosConfig
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.rope_scaling import LinearScaling, NoScaling, RopeScaling

SUFFIX = ".gguf"
_ARCHITECTURES = ("llama", "qwen3")
_DTYPES = {"F64": torch.float64, "F16": torch.float16, "BF16": torch.bfloat16}
# token_type of tokens that a text does not contain: unknown, control, unused.
_SPECIAL, _NORMAL = (2, 3, 5), 1


class GGUFFile:
    """An open file: metadata as fields, and its tensors."""

    def __init__(self, path: Path) -> None:
        try:
            import gguf
        except ImportError as error:
            raise ConfigError(f"{path}: {needs('gguf')}") from error
        self.path = path
        self._dequantize = gguf.quants.dequantize
        try:
            reader = gguf.GGUFReader(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
        except (ValueError, IndexError, KeyError) as error:
            raise ConfigError(f"{path}: is damaged or not a GGUF file: {error}") from error
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self._metadata = reader.fields

    def names(self) -> Iterable[str]:
        return self._tensors

    def header(self, name: str) -> Tensor:
        found = self._tensors[name]
        dtype = _DTYPES.get(found.tensor_type.name, torch.float32)
        shape = [int(size) for size in reversed(found.shape)]
        return torch.empty(shape, dtype=dtype, device="meta")

    def get(self, name: str) -> Tensor:
        found, header = self._tensors[name], self.header(name)
        numbers = torch.tensor(self._dequantize(found.data, found.tensor_type))
        return numbers.view(header.shape).to(header.dtype)

    def value(self, key: str, default: Any = None) -> Any:
        """One entry of the metadata; a vocabulary takes a second."""
        return self._metadata[key].contents() if key in self._metadata else default

    def fields(self) -> Fields:
        """The metadata without the prefix of the architecture, and whether there is a head."""
        architecture = str(self.value("general.architecture"))
        others = ("general.", "tokenizer.", "GGUF.", "quantize.")
        names = [key for key in self._metadata if not key.startswith(others)]
        data = {key.removeprefix(f"{architecture}."): self.value(key) for key in names}
        own = {"architecture": architecture, "tied": "output.weight" not in self._tensors}
        return Fields(self.path, data | own)

    def tokenizer(self, vocab_size: int) -> Tokenizer:
        """The tokenizer in the metadata; only byte-level BPE."""

        def get(key: str, default: Any = None) -> Any:
            return self.value(f"tokenizer.ggml.{key}", default)

        kind, tokens = get("model"), get("tokens")
        if kind != "gpt2":
            raise ConfigError(f"{self.path}: tokenizer {kind!r} is not implemented, only 'gpt2'")
        added = {
            text: kind in _SPECIAL
            for text, kind in zip(tokens, get("token_type", [_NORMAL] * len(tokens)), strict=True)
            if kind != _NORMAL
        }
        made = byte_level_bpe(tokens, get("merges"), added, get("pre", "default"), str(self.path))
        eos = int(get("eos_token_id"))
        return PublicTokenizer(
            made,
            vocab_size=vocab_size,
            bos_id=int(get("bos_token_id", eos)),
            stop_ids=sorted({eos, int(get("eot_token_id", eos))}),
            adds_bos=bool(get("add_bos_token", False)),
            name=str(self.path),
        )


def _read(fields: Fields) -> MythosConfig:
    fields.fixed("architecture", *_ARCHITECTURES)
    dim, heads = fields.integer("embedding_length"), fields.integer("attention.head_count")
    size = fields.integer("attention.key_length", dim // heads)
    fields.fixed("attention.value_length", size)
    fields.fixed("rope.dimension_count", size)
    fields.unrelated("vocab_size")
    vocab = fields.integer("vocab_size", 0)
    return MythosConfig(
        vocab_size=vocab,
        dim=dim,
        context=fields.integer("context_length"),
        prelude_layers=0,
        recurrent_layers=fields.integer("block_count"),
        coda_layers=0,
        num_loops=1,
        attention=GroupedQueryAttention(
            num_heads=heads,
            num_kv_heads=fields.integer("attention.head_count_kv", heads),
            head_dim=size if size * heads != dim else 0,
            rope_base=fields.number("rope.freq_base", 10_000.0),
            rope_scaling=_scaling(fields),
            qk_norm=fields.data["architecture"] == "qwen3",
        ),
        tie_embeddings=fields.flag("tied"),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        **swiglu(fields.integer("feed_forward_length")),
        **BARE,
    )


def _scaling(fields: Fields) -> RopeScaling:
    kind = fields.get("rope.scaling.type", "none")
    if kind == "none":
        return NoScaling()
    if kind == "linear":
        return LinearScaling(factor=fields.number("rope.scaling.factor"))
    raise fields.error("rope.scaling.type", "is not implemented, only none or linear")


def _rules(config: MythosConfig) -> list[Rule]:
    attention, _, _ = attention_sizes(config)
    feed_forward, head_dim = config.feed_forward, attention.size(config.dim)
    assert isinstance(feed_forward, SwiGLU)
    query, key = (
        same(f"attn_{part[0]}.weight", f"attention.{part}.weight") for part in ("query", "key")
    )
    norms: list[Rule] = []
    if attention.qk_norm:
        parts = ("query", "key")
        norms = [same(f"attn_{x[0]}_norm.weight", f"attention.{x}_norm.weight") for x in parts]
    else:  # llama.cpp rotates neighbouring pairs for Llama
        query, key = (interleaved(rule, head_dim) for rule in (query, key))
    layer = [
        query,
        key,
        *norms,
        same("attn_v.weight", "attention.value.weight"),
        same("attn_output.weight", "attention.output.weight"),
        same("attn_norm.weight", "attention_norm.weight"),
        same("ffn_norm.weight", "feed_forward_norm.weight"),
        same("ffn_down.weight", "feed_forward.down.weight"),
        stacked(
            ("ffn_gate.weight", "ffn_up.weight"),
            "feed_forward.gate_up.weight",
            [feed_forward.hidden_dim] * 2,
        ),
    ]
    found = [same("token_embd.weight", "embed.weight"), same("output_norm.weight", "norm.weight")]
    for i in range(config.recurrent_layers):
        found += under(f"blk.{i}.", f"recurrent.layers.{i}.", layer)
    return found if config.tie_embeddings else [*found, same("output.weight", "head.weight")]


GGUF = Format(
    name="gguf",
    family="GGUF of Llama or Qwen3: one loop",
    recognises=lambda _data: False,  # known by its suffix
    read=_read,
    rules=_rules,
    exits=ONE_LOOP,
)
