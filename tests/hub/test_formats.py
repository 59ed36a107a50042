"""Every format: logits of an independent reference and of the authors' code, caching, both ways.

The models of transformers are compared with transformers itself; all others with `references`.
"""

import importlib
import json
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from references import CASES, OURO_EXITS, OURO_EXPECTED, SEQ, TOKENS, VOCAB, Case, ouro_states
from safetensors.torch import load_file, save_file
from scipy.special import erfinv
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen3Config,
)

import openmythos
from openmythos import OpenMythos
from openmythos.config import apply_overrides
from openmythos.hub import export, weights
from openmythos.hub.load import open_source, save
from openmythos.planning import cost
from openmythos.recurrence.initial_state import EncodedState, SineHashState

BAR = 1e-4


def write(folder: Path, config: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """A checkpoint as its authors publish it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if "_class_name" in config:  # Parcae's are pickles with two names for the embedding
        tied = {"lm_head.weight": weights["transformer.wte.weight"]}
        torch.save(weights | tied, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors")
    return folder


@dataclass(frozen=True)
class Loaded:
    """A checkpoint and what it should compute."""

    folder: Path
    expected: Tensor  # logits of TOKENS
    state: Tensor | None  # h_0, if the model is given one
    case: Case | None = None

    def model(self, **options: Any) -> OpenMythos:
        return openmythos.load(self.folder, **options)

    def logits(self, model: OpenMythos) -> Tensor:
        return model(TOKENS, initial_state=self.state).logits


DENSE = {
    **{"vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64},
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    **{"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
}
THEIRS: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**DENSE | {"rms_norm_eps": 1e-5}),
    "llama_tied": lambda: LlamaConfig(**DENSE | {"tie_word_embeddings": True}),
    "llama3_rope": lambda: LlamaConfig(**DENSE, rope_parameters=_LLAMA3),
    "mistral": lambda: MistralConfig(**DENSE, sliding_window=5),
    "qwen3": lambda: Qwen3Config(**DENSE, head_dim=24),
    "olmo2": lambda: Olmo2Config(**DENSE),
    "gemma": lambda: GemmaConfig(**DENSE | {"tie_word_embeddings": True}, head_dim=24),
}


@torch.no_grad()
def transformers_model(name: str) -> Any:
    """A small model with norms and head far from their first values."""
    model = AutoModelForCausalLM.from_config(THEIRS[name](), attn_implementation="eager").eval()
    for key, tensor in model.named_parameters():
        if "norm" in key:
            tensor.uniform_(0.5, 1.5).sub_(1 if name == "gemma" else 0)
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="module", params=[*CASES, *THEIRS])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    if name in CASES:
        case = CASES[name]
        write(folder, case.config, case.weights)
        given = isinstance(open_source(folder).config.state_init, EncodedState)
        return Loaded(folder, case.reference(), None if given else case.state(), case)
    torch.manual_seed(0)
    model = transformers_model(name)
    model.save_pretrained(folder)
    with torch.no_grad():
        return Loaded(folder, model(TOKENS).logits, None)


@torch.no_grad()
def test_logits_equal_the_reference(loaded: Loaded) -> None:
    assert loaded.expected.std() > 0.5  # or any model would be close
    assert float((loaded.logits(loaded.model()) - loaded.expected).abs().max()) <= BAR


GOLDEN = [name for name, case in CASES.items() if case.golden]


@torch.no_grad()
@pytest.mark.parametrize("name", GOLDEN)
def test_logits_equal_the_authors_code(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = openmythos.load(write(tmp_path, case.config, case.weights))
    encoded = isinstance(model.config.state_init, EncodedState)
    logits = model(TOKENS, initial_state=None if encoded else case.state()).logits
    assert case.golden is not None
    assert case.golden.differences(logits) <= BAR
    assert case.golden.differences(case.reference()) <= BAR


@torch.no_grad()
def test_cached_decoding_equals_the_full_pass(loaded: Loaded) -> None:
    model = loaded.model()
    whole, cache = loaded.logits(model), model.new_cache(1, SEQ)
    for start, end in [(0, 5), *((i, i + 1) for i in range(5, SEQ))]:
        state = None if loaded.state is None else loaded.state[:, start:end]
        part = model(TOKENS[:, start:end], cache=cache, initial_state=state).logits
        cache.advance(end - start)
        assert float((part - whole[:, start:end]).abs().max()) <= BAR


def test_a_written_checkpoint_is_the_one_that_was_read(loaded: Loaded, tmp_path: Path) -> None:
    found, model = open_source(loaded.folder), loaded.model()
    own = tmp_path / "own"
    model.save_pretrained(own)
    again = openmythos.load(own)
    assert again.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    if found.format.write is None:
        return
    save(model, tmp_path / "theirs", found.format.name)
    assert open_source(tmp_path / "theirs").format is found.format
    back = openmythos.load(tmp_path / "theirs")
    assert back.config == model.config
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key
    if (loaded.folder / "model.safetensors").exists():
        source = load_file(loaded.folder / "model.safetensors")
        written = load_file(tmp_path / "theirs" / "model.safetensors")
        assert written.keys() == source.keys()
        for key, tensor in source.items():
            same = torch.equal if found.format.name != "gemma" else torch.allclose
            assert same(written[key], tensor), key


@torch.no_grad()
@pytest.mark.parametrize("name", THEIRS)
def test_transformers_reads_what_is_written(name: str, tmp_path: Path) -> None:
    theirs = transformers_model(name)
    theirs.save_pretrained(tmp_path / "theirs")
    source = open_source(tmp_path / "theirs")
    save(source.load(), tmp_path / "ours", source.format.name)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    torch.testing.assert_close(again(TOKENS).logits, theirs(TOKENS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_an_export_for_transformers_is_read(tied: bool, tmp_path: Path) -> None:
    config = apply_overrides(openmythos.presets.tiny(), [f"tie_embeddings={tied}".lower()])
    model = OpenMythos(config, seed=0)
    export.write(model, tmp_path / "export")
    again = openmythos.load(tmp_path / "export")
    assert open_source(tmp_path / "export").format.name == "openmythos-hf"
    assert again.config == model.config
    assert all(torch.equal(again.state_dict()[k], x) for k, x in model.state_dict().items())


# -- Ouro's gate


@pytest.fixture(scope="module")
def ouro(tmp_path_factory: pytest.TempPathFactory) -> OpenMythos:
    case = CASES["ouro"]
    return openmythos.load(write(tmp_path_factory.mktemp("ouro"), case.config, case.weights))


def with_gate(model: OpenMythos, *changes: str) -> OpenMythos:
    config = apply_overrides(model.config, [f"halting.{change}" for change in changes])
    other = OpenMythos(config)
    other.load_state_dict(model.state_dict())
    return other.eval()


@torch.no_grad()
def test_expected_readout(ouro: OpenMythos) -> None:
    model = with_gate(ouro, "readout=expected")
    case = CASES["ouro"]
    states, chances = ouro_states(case.weights, case.config, TOKENS)
    mean = sum(p[..., None] * h for p, h in zip(chances, states, strict=True))
    expected = mean @ case.weights["lm_head.weight"].T
    logits = model(TOKENS).logits
    assert float((logits - expected).abs().max()) <= BAR
    assert OURO_EXPECTED.differences(logits) <= BAR
    cache = model.new_cache(1, SEQ)
    for i in range(SEQ):
        part = model(TOKENS[:, i : i + 1], cache=cache).logits
        cache.advance(1)
        assert float((part - logits[:, i : i + 1]).abs().max()) <= BAR


@torch.no_grad()
@pytest.mark.parametrize("threshold", OURO_EXITS)
def test_selected_readout(ouro: OpenMythos, threshold: float) -> None:
    case = CASES["ouro"]
    states, _ = ouro_states(case.weights, case.config, TOKENS)
    picked = torch.stack([states[loop][0, i] for i, loop in enumerate(OURO_EXITS[threshold])])
    logits = with_gate(ouro, f"threshold={threshold}")(TOKENS).logits
    assert float((logits[0] - picked @ case.weights["lm_head.weight"].T).abs().max()) <= BAR


@torch.no_grad()
def test_frozen_readout_stops_where_it_selects(ouro: OpenMythos) -> None:
    """The first position sees no other, so freezing cannot change it; loops are saved."""
    frozen = with_gate(ouro, "threshold=0.6", "readout=freeze")
    selected = with_gate(ouro, "threshold=0.6")
    out = frozen(TOKENS)
    assert out.recurrence.loops_used[0].tolist()[:2] == [2, 1]
    torch.testing.assert_close(out.logits[:, 0], selected(TOKENS).logits[:, 0])
    assert not torch.allclose(out.logits[:, -1], selected(TOKENS).logits[:, -1], atol=1e-3)


# -- xLLM-Loop's state


def test_the_hashed_state_is_that_of_xllm() -> None:
    dim, positions = 48, torch.arange(3, 9)[None]
    angle = np.arange(dim, dtype=np.float32) * np.float32(0.013579)
    angle = angle + np.arange(3, 9, dtype=np.float32)[:, None] * np.float32(0.021713)
    value = np.sin(angle + np.float32(0.123457)) * np.float32(43758.5453123)
    u = np.clip((value - np.floor(value)).astype(np.float64), 1e-6, 1 - 1e-6)
    expected = math.sqrt(2) * erfinv(2 * u - 1)
    found = SineHashState().draw(torch.zeros(1, 6, dim), positions, fresh=False) * dim**0.5
    # The factor magnifies the last bit of the sine to 3e-3 of u.
    near = (found[0].double() - torch.from_numpy(expected)).abs() < 0.05
    assert near.float().mean() > 0.95


# -- files


@pytest.fixture
def huginn(tmp_path: Path) -> Iterator[Path]:
    yield write(tmp_path / "huginn", CASES["huginn"].config, CASES["huginn"].weights)


def shard(folder: Path, parts: int) -> None:
    """Split a checkpoint's file, as large ones are published."""
    whole = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    table = {name: files[i % parts] for i, name in enumerate(whole)}
    for file in files:
        save_file({k: w for k, w in whole.items() if table[k] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@torch.no_grad()
def test_shards_are_one_checkpoint(huginn: Path) -> None:
    expected = openmythos.load(huginn).state_dict()
    shard(huginn, 3)
    found = openmythos.load(huginn).state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


def test_dtype_is_kept_or_chosen(huginn: Path) -> None:
    given = {k: w.bfloat16() for k, w in CASES["huginn"].weights.items()}
    save_file(given, huginn / "model.safetensors")
    assert {t.dtype for t in openmythos.load(huginn).state_dict().values()} == {torch.bfloat16}
    wide = openmythos.load(huginn, dtype=torch.float32)
    assert {t.dtype for t in wide.state_dict().values()} == {torch.float32}
    given["transformer.adapter.weight"] = given["transformer.adapter.weight"].float()
    save_file(given, huginn / "model.safetensors")
    mixed = openmythos.load(huginn)
    assert {t.dtype for t in mixed.parameters() if t.ndim > 1} == {torch.float32}


@torch.no_grad()
def test_bf16_computes(loaded: Loaded) -> None:
    """Also where norm weights stay in fp32."""
    model = loaded.model(dtype=torch.bfloat16)
    state = None if loaded.state is None else loaded.state.bfloat16()
    logits = model(TOKENS, initial_state=state).logits
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - loaded.expected).norm() / loaded.expected.norm()
    assert float(error) < 0.2


def test_tensors_are_read_one_rule_at_a_time(huginn: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that was read, at most one rule's tensors exist besides the model's own."""
    alive, most, get = 0, 0, weights.SafeTensors.get

    def released() -> None:
        nonlocal alive
        alive -= 1

    def counted(self: weights.SafeTensors, name: str) -> Tensor:
        nonlocal alive, most
        tensor = get(self, name).clone()
        alive, most = alive + 1, max(most, alive + 1)
        weakref.finalize(tensor, released)
        return tensor

    monkeypatch.setattr(weights.SafeTensors, "get", counted)
    openmythos.load(huginn, dtype=torch.float64)  # so that no tensor becomes a parameter itself
    assert most <= 2 + 1  # an untied pair, and the tensor of the rule before


def test_devices_and_steps_are_checked(huginn: Path) -> None:
    with pytest.raises(openmythos.ConfigError, match="device"):
        openmythos.load(huginn, device="tpu")
    with pytest.raises(openmythos.ConfigError, match="is not a run"):
        open_source(huginn).load(step=3)


def test_the_page_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "benchmarks")
    formats = importlib.import_module("formats")
    rows = json.loads(formats.RESULTS.read_text())["rows"]
    assert {row["model"] for row in rows} == {*CASES, *THEIRS}
    assert all(max(row["reference"], row["cached"]) <= BAR for row in rows)
    assert formats.table(rows) in formats.PAGE.read_text()


_OURO_1B = {
    **{"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 49152},
    **{"num_attention_heads": 16, "num_key_value_heads": 16, "max_position_embeddings": 65536},
}
PUBLISHED: dict[str, tuple[str, dict[str, Any], int]] = {
    "Ouro 1.4B": (
        "ouro",
        _OURO_1B | {"num_hidden_layers": 24, "layer_types": None},
        1_434_652_673,
    ),
    "Ouro 2.6B": (
        "ouro",
        _OURO_1B | {"num_hidden_layers": 48, "layer_types": None},
        2_667_974_657,
    ),
    "Huginn": (
        "huginn",
        {
            **{"n_embd": 5280, "n_heads": 55, "num_key_value_heads": 55, "vocab_size": 65536},
            **{"intermediate_size": 17920, "n_layers_in_prelude": 2, "n_layers_in_coda": 2},
            "n_layers_in_recurrent_block": 4,
        },
        3_565_000_000,
    ),
    "Recurrent TinyLlama": (
        "retrofit_llama",
        {
            **{"n_embd": 2048, "n_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
            **{"intermediate_size": 5632, "n_layers_in_prelude": 4, "n_layers_in_coda": 4},
            "n_layers_in_recurrent_block": 8,
        },
        844_000_000,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_models(name: str, tmp_path: Path) -> None:
    case, sizes, published = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(CASES[case].config | sizes))
    count = cost.parameters(open_source(tmp_path).config).total
    exact = published % 1_000_000 != 0
    assert count == published if exact else abs(count - published) < 500_000
