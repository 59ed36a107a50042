"""Yardsticks of decoding from outside: a Llama without loops, in transformers and in llama.cpp.

The Llama has the width, heads, vocabulary and executed layers of a workload, and feed-forward
layers so wide that a decoded token takes as many floating-point operations. Without loops, latent
attention and experts it reads nearly as many bytes per token (4% more at S, 1% at M) as the looped
model does if every loop reads its weights again from memory.
"""

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import torch
from contenders import Contender, SkippedError, Workload
from host import processor_kind
from peers import cache_argument
from torch import Tensor

from openmythos.planning import cost

KEYS = 512  # that a decoded token attends to, for which operations are equal


def feed_forward_width(workload: Workload) -> int:
    """The width at which a token that attends to KEYS others costs what the looped model costs."""
    w, layers = workload, workload.loops + 2
    wanted = cost.Flops(w.config(), 2 * KEYS).forward(w.loops) / 2 - w.vocab * w.dim
    attention = 4 * w.dim**2 + 2 * KEYS * w.dim
    return 32 * round((wanted / layers - attention) / (3 * w.dim) / 32)


def dense_llama(workload: Workload) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    w = workload
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=w.vocab,
        hidden_size=w.dim,
        intermediate_size=feed_forward_width(w),
        num_hidden_layers=w.loops + 2,
        num_attention_heads=w.heads,
        num_key_value_heads=w.heads,
        max_position_embeddings=w.context,
        tie_word_embeddings=True,
        rms_norm_eps=1e-6,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


class StaticLlama(Contender):
    """transformers' Llama with its static cache; the decoding step is one compiled graph."""

    name = "transformers Llama, static cache, compiled"
    figures = ("prefill", "decode")

    def __init__(self, workload: Workload) -> None:
        self.model = dense_llama(workload)
        self._cache_name = cache_argument(self.model)
        mode = "reduce-overhead" if torch.cuda.is_available() else None  # as its `generate`
        self._step = torch.compile(self.model.forward, fullgraph=True, dynamic=False, mode=mode)

    def prefill(self, tokens: Tensor, room: int) -> Any:
        from transformers import StaticCache

        seq = tokens.shape[1]
        cache = StaticCache(self.model.config, max_cache_len=seq + room)
        self.model(tokens, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})
        return cache, torch.full((1, 1), seq, device=tokens.device)

    def decode(self, cache: Any, tokens: Tensor) -> None:
        held, position = cache
        self._step(tokens, position_ids=position, use_cache=True, **{self._cache_name: held})
        position += 1

    def cache_bytes(self, cache: Any) -> int:
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache[0].layers)


class LlamaCpp(Contender):
    """llama.cpp (package llama-cpp-python) on the same Llama, weights and cache in fp32."""

    name = "llama.cpp"
    figures = ("prefill", "decode")

    def __init__(self, workload: Workload) -> None:
        try:
            import llama_cpp
        except ImportError as error:
            raise SkippedError("llama-cpp-python is not installed") from error
        self._lib = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept: C calls it
        llama_cpp.llama_log_set(self._silent, None)
        built_for = llama_cpp.llama_print_system_info().decode()
        if "avx512" not in processor_kind() and "AVX512 = 1" in built_for:
            raise SkippedError("this llama.cpp is built for AVX-512, the others run with AVX2")
        self.model = torch.nn.Module()  # has no weights for torch
        params = llama_cpp.llama_model_default_params()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "dense.gguf"
            write_gguf(dense_llama(workload), path)
            self._model = llama_cpp.llama_model_load_from_file(bytes(path), params)
        self._vocab = workload.vocab

    def prefill(self, tokens: Tensor, room: int) -> Any:
        lib, (rows, seq) = self._lib, tokens.shape
        params = lib.llama_context_default_params()
        params.n_ctx = rows * (seq + room)
        params.n_batch = params.n_ubatch = 512
        params.n_seq_max = rows
        params.n_threads = params.n_threads_batch = torch.get_num_threads()
        params.type_k = params.type_v = lib.GGML_TYPE_F32
        params.flash_attn_type = 0  # off: three times as fast for one row in fp32
        held = _Context(lib, lib.llama_init_from_model(self._model, params), rows, seq)
        for row in range(rows):
            held.feed(tokens[row].tolist(), [row] * seq, range(seq), [seq - 1])
        return held

    def decode(self, cache: Any, tokens: Tensor) -> None:
        rows = tokens.shape[0]
        cache.feed(tokens[:, 0].tolist(), range(rows), [cache.position] * rows, range(rows))
        cache.position += 1

    def logits(self, cache: Any, row: int) -> list[float]:
        """The logits of one row of the last call, [vocab]."""
        return cache.logits(row)[: self._vocab]

    def cache_bytes(self, cache: Any) -> int:
        return cache.nbytes


class _Context:
    """llama.cpp's cache of some rows and the batch that feeds it."""

    def __init__(self, lib: Any, pointer: Any, rows: int, seq: int) -> None:
        self._lib, self._pointer, self.position = lib, pointer, seq
        self._batch = lib.llama_batch_init(max(rows, seq), 0, 1)

    def feed(self, tokens: Any, rows: Any, positions: Any, wanted: Any) -> None:
        """Append a token to a row at a position, for each; logits of the `wanted` ones."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for place, (token, row, position) in enumerate(zip(tokens, rows, positions, strict=True)):
            batch.token[place], batch.pos[place] = token, position
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, row
            batch.logits[place] = place in wanted
        if self._lib.llama_decode(self._pointer, batch):
            raise RuntimeError("llama_decode failed")
        self._lib.llama_synchronize(self._pointer)

    def logits(self, row: int) -> Any:
        found = self._lib.llama_get_logits_ith(self._pointer, row)
        return ctypes.cast(found, ctypes.POINTER(ctypes.c_float))

    @property
    def nbytes(self) -> int:
        return int(self._lib.llama_state_get_size(self._pointer))

    def __del__(self) -> None:
        self._lib.llama_batch_free(self._batch)
        self._lib.llama_free(self._pointer)


def write_gguf(model: Any, path: Path) -> None:
    """A transformers Llama as a GGUF file in fp32, without a tokenizer."""
    import gguf

    c = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(c.max_position_embeddings)
    writer.add_embedding_length(c.hidden_size)
    writer.add_block_count(c.num_hidden_layers)
    writer.add_feed_forward_length(c.intermediate_size)
    writer.add_head_count(c.num_attention_heads)
    writer.add_head_count_kv(c.num_key_value_heads)
    writer.add_layer_norm_rms_eps(c.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    found = {"token_embd": model.model.embed_tokens.weight, "output_norm": model.model.norm.weight}
    for number, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_parameter(f"{ours}.weight")
            if theirs in ("attn_q", "attn_k"):  # rotates neighbours, not halves
                halves = weight.view(c.num_attention_heads, 2, -1, c.hidden_size)
                weight = halves.transpose(1, 2).reshape(weight.shape)
            found[f"blk.{number}.{theirs}"] = weight
    for name, weight in found.items():
        writer.add_tensor(f"{name}.weight", weight.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
