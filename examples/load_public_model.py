"""Read a public looped model and look at what its loops do. Needs only this package, no network.

python examples/load_public_model.py                 # writes a small model in Huginn's format
python examples/load_public_model.py tomg-group-umd/huginn-0125        # or reads a real one
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

import openmythos


def write_small_huginn(folder: Path, dim: int = 64, vocab: int = 256) -> None:
    """A checkpoint of random weights as its authors publish it: their keys, their names."""
    layers = {f"n_layers_in_{part}": 1 for part in ("prelude", "recurrent_block", "coda")}
    config = {"model_type": "huginn_raven", "mean_recurrence": 8, "block_size": 128, **layers}
    config |= {"padded_vocab_size": vocab, "n_embd": dim, "n_heads": 4, "intermediate_size": 128}
    shapes = {"wte": [vocab, dim], "adapter": [dim, 2 * dim], "ln_f": [dim]}
    for layer in ("prelude.0", "core_block.0", "coda.0"):
        shapes |= {f"{layer}.attn.Wqkv": [3 * dim, dim], f"{layer}.attn.proj": [dim, dim]}
        shapes |= {f"{layer}.mlp.fc": [256, dim], f"{layer}.mlp.proj": [dim, 128]}
        shapes |= {f"{layer}.norm_{i}": [dim] for i in (1, 2, 3, 4)}
    torch.manual_seed(0)
    tensors = {
        f"transformer.{name}.weight": torch.ones(shape)
        if len(shape) == 1
        else torch.randn(shape) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    for layer in ("prelude.0", "core_block.0", "coda.0"):
        tensors[f"transformer.{layer}.attn.qk_bias"] = torch.zeros(2, 1, 4, dim // 4)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")


with tempfile.TemporaryDirectory() as folder:
    source = sys.argv[1] if len(sys.argv) > 1 else folder
    if source == folder:
        write_small_huginn(Path(folder))
    model = openmythos.load(source)

prompt = torch.arange(3, 15)[None]
for num_loops in (2, 16):
    new = model.generate(prompt, max_new_tokens=12, num_loops=num_loops)
    print(f"{num_loops:>2} loops: {new[0].tolist()}")

print("change of the next token's distribution by one more loop (KL divergence in nats):")
with torch.no_grad():
    by_loop = model(prompt, num_loops=17, collect_loops="all", last_only=True).loop_logits
logs = {loops: logits[0, -1].float().log_softmax(-1) for loops, logits in by_loop.items()}
for loops in (1, 2, 3, 4, 6, 8, 12, 16):
    before, after = logs[loops], logs[loops + 1]
    print(f"  {loops:>2} -> {loops + 1:<2}  {float((after.exp() * (after - before)).sum()):.5f}")
