"""Exports in vLLM: under a stand-in that keeps keys and values as vLLM does, and in vLLM itself.

The latter is slow, and skipped without .venv-hub/vllm, which docs/huggingface.md says how to make.
"""

import json
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.test_export import shaken
from hub.test_export_outside import ROOT, environment
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from variants import tiny, tiny_config

from openmythos import OpenMythos
from openmythos.hub import export
from openmythos.hub.export_config import OpenMythosConfig
from openmythos.hub.export_model import OpenMythosModel
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.value_embedding import GatedValueEmbeddings
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.initial_state import NormalState
from openmythos.recurrence.injection import LTI

PYTHON = ROOT / ".venv-hub" / "vllm" / "bin" / "python"
LENGTHS = {"a": 9, "b": 6, "c": 5}
PASSES = ({"a": 5}, {"a": 1, "b": 3}, {"c": 1, "a": 3, "b": 1}, {"b": 2, "c": 4})
GROUPED: dict[str, Any] = {
    "attention": tiny(GroupedQueryAttention, rope_dim=4),
    "injection": tiny(LTI),
    "state_init": NormalState(),
    "value_embeddings": tiny(GatedValueEmbeddings, gate_channels=8),
}


class Engine:
    """Keys and values per attention module and request; a pass has tokens of several requests."""

    def __init__(self) -> None:
        self.keys: dict[tuple[nn.Module, str], list[Tensor]] = defaultdict(list)
        self.values: dict[tuple[nn.Module, str], list[Tensor]] = defaultdict(list)
        self.counts: dict[str, int] = {}  # tokens of each request in the next pass

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: None
    ) -> tuple[Tensor, None]:
        """Shapes as in vLLM: one row of all tokens in, [tokens, heads * dim] out."""
        outputs, start = [], 0
        for request, count in self.counts.items():
            new = slice(start, start + count)
            start += count
            for kept, x in ((self.keys, key), (self.values, value)):
                kept[module, request].append(x[..., new, :])
            keys, values = (
                torch.cat(kept[module, request], 2) for kept in (self.keys, self.values)
            )
            total = keys.shape[2]
            seen = torch.ones(count, total, dtype=torch.bool).tril(total - count)
            out = scaled_dot_product_attention(
                query[..., new, :], keys, values, attn_mask=seen, enable_gqa=True
            )
            outputs.append(out[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs), None


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine()
    ALL_ATTENTION_FUNCTIONS["vllm"] = made.attend
    yield made
    del ALL_ATTENTION_FUNCTIONS["vllm"]


def served(native: OpenMythos, num_loops: int) -> OpenMythosModel:
    """The backbone as vLLM builds it: the number of loops is overridden in the config."""
    config = OpenMythosConfig(**json.loads(json.dumps(export.config_json(native))))
    config.num_loops = num_loops
    backbone = OpenMythosModel._from_config(config, attn_implementation="vllm").eval()
    state = {name: x for name, x in native.state_dict().items() if name != "head.weight"}
    backbone.mythos.load_state_dict(state)
    return backbone.to(native.head_weight.dtype)


@pytest.mark.parametrize("parts", [GROUPED, {"attention": tiny(LatentAttention)}])
def test_passes_with_tokens_of_several_requests(parts: dict[str, Any], engine: Engine) -> None:
    """Prompts in pieces beside single tokens of others, and more loops than the config has."""
    native, loops = shaken(tiny_config(**parts)).double(), 5
    backbone = served(native, loops)
    tokens = {name: torch.randint(native.config.vocab_size, (n,)) for name, n in LENGTHS.items()}
    hidden: dict[str, list[Tensor]] = defaultdict(list)
    done = dict.fromkeys(tokens, 0)
    for counts in PASSES:
        engine.counts = counts
        spans = [torch.arange(done[name], done[name] + n) for name, n in counts.items()]
        row = torch.cat([tokens[name][span] for name, span in zip(counts, spans, strict=True)])
        with torch.no_grad():
            out = backbone(row[None], position_ids=torch.cat(spans)[None], return_dict=False)[0]
        for name, part in zip(counts, out[0].split([*counts.values()]), strict=True):
            hidden[name].append(part)
            done[name] += len(part)
    assert done == LENGTHS
    for name, row in tokens.items():
        with torch.no_grad():
            whole = native(row[None], num_loops=loops).logits[0]
            torch.testing.assert_close(native.logits(torch.cat(hidden[name])), whole)


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"halting": tiny(ACT)}, "halting = 'act': must be 'none'"),
        ({"attention": tiny(LatentAttention, value_head_dim=16)}, "value_head_dim = 16"),
        ({"logit_scale": 2.0, "logit_softcap": 5.0}, "logit_softcap = 5.0"),
    ],
)
def test_what_vllm_would_compute_wrongly_is_refused(parts: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        served(shaken(tiny_config(**parts)), 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grouped", "latent"])
def test_vllm_gives_the_models_own_tokens(name: str, tmp_path: Path) -> None:
    if not PYTHON.is_file():
        pytest.skip(f"no {PYTHON.relative_to(ROOT)}")
    # vLLM's attention for a CPU has heads of 32 numbers and more.
    parts: dict[str, Any] = {
        "grouped": GROUPED | {"attention": tiny(GroupedQueryAttention, head_dim=32, window=6)},
        "latent": {"attention": tiny(LatentAttention, nope_head_dim=20, rope_head_dim=12)},
    }
    native, loops = shaken(tiny_config(**parts[name])), 5
    prompts = [torch.randint(50, (n,)).tolist() for n in (1, 3, 12)]
    export.write(native, tmp_path / "model")
    asked = {"model": str(tmp_path / "model"), "prompts": prompts, "new": 10, "num_loops": loops}
    (tmp_path / "in.json").write_text(json.dumps(asked))
    command = [PYTHON, Path(__file__).with_name("vllm_outside.py"), tmp_path / "in.json"]
    names = environment(tmp_path, with_package=False)
    done = subprocess.run(
        [*command, tmp_path / "out.json"], capture_output=True, text=True, env=names
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads((tmp_path / "out.json").read_text())
    for prompt, own in zip(prompts, found, strict=True):
        row = torch.tensor([prompt])
        tokens = native.generate(row, max_new_tokens=10, num_loops=loops)
        assert own["tokens"] == tokens[0].tolist()
        whole = torch.cat((row, tokens), dim=1)
        with torch.no_grad():
            logs = native(whole, num_loops=loops).logits[0].log_softmax(-1)
        chosen = logs[len(prompt) - 1 : -1].gather(1, tokens[0, :, None])[:, 0]
        torch.testing.assert_close(torch.tensor(own["logs"]), chosen, atol=1e-4, rtol=1e-4)
