"""What cannot be represented is refused in one line that names it."""

import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from references import CASES
from safetensors.torch import save_file
from torch import Tensor

import openmythos
from openmythos import ConfigError, MythosConfig, OpenMythos, presets
from openmythos.hub.fields import Fields
from openmythos.hub.load import FORMATS, find, open_source, save

Weights = dict[str, Tensor]
Change = Callable[[dict[str, Any], Weights], None]


def put(folder: Path, name: str, change: Change) -> Path:
    """A checkpoint of `references` with a defect."""
    config, weights = json.loads(json.dumps(CASES[name].config)), CASES[name].weights
    change(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: w.contiguous() for k, w in weights.items()}, folder / "model.safetensors")
    return folder


def setting(**changes: Any) -> Change:
    return lambda config, _weights: config.get("model", config).update(changes)


def without(key: str) -> Change:
    return lambda config, _weights: config.pop(key)


def tensors(**changes: Callable[[Tensor], Tensor | None]) -> Change:
    """Change tensors by name ("__" for a dot); a change to None drops the tensor."""

    def change(_config: dict[str, Any], weights: Weights) -> None:
        for key, make in changes.items():
            name = key.replace("__", ".")
            made = make(weights.pop(name))
            if made is not None:
                weights[name] = made

    return change


def adding(name: str, like: str) -> Change:
    return lambda _config, weights: weights.update({name: weights[like] + 1})


def decay_of_one(_config: dict[str, Any], weights: Weights) -> None:
    weights["transformer.adapter.A_log"].fill_(-40)


REFUSED: list[tuple[str, Change, str]] = [
    # options that are not implemented
    ("huginn", setting(injection_type="add"), "injection_type = 'add': is not implemented"),
    ("huginn", setting(test_time_noise=0.1), "test_time_noise = 0.1: is not implemented"),
    ("huginn", setting(num_key_value_heads=2), "num_key_value_heads = 2"),
    ("huginn", setting(bias=True), "bias = True"),
    ("huginn", setting(tie_word_embeddings=False), "tie_word_embeddings = False"),
    ("huginn", setting(state_init="zero"), "state_init = 'zero'"),
    ("huginn", setting(block_class_name="GemmaLayer"), "neither Llama's nor OLMo 2's"),
    ("ouro", setting(attention_bias=True), "attention_bias = True"),
    ("ouro", setting(use_sliding_window=True), "use_sliding_window = True"),
    ("ouro", setting(layer_types=["full_attention", "sliding_attention"]), "layer_types = "),
    ("ouro", setting(hidden_act="gelu"), "hidden_act = 'gelu'"),
    ("ouro", setting(early_exit_step=2), "early_exit_step = 2"),
    ("ouro", setting(rope_scaling={"type": "dynamic", "factor": 2.0}), "rope_scaling = "),
    ("ouro", setting(rope_scaling={"type": "yarn", "factor": 2.0, "mscale": 1.0}), "must be a num"),
    ("ouro", setting(rope_parameters={"rope_theta": 5.0}), "rope_theta = 1000000.0: differs"),
    ("nanbeige", setting(loop_share_kv=True), "loop_share_kv = True"),
    ("nanbeige", setting(enable_mhc=True), "enable_mhc = True"),
    ("nanbeige", setting(num_loops=5), "loop_loss_weights = .* does not fit num_loops = 5"),
    ("nanbeige", setting(kv_channels=8), "kv_channels = 8"),
    ("parcae", setting(qk_norm=False), "qk_norm = False"),
    ("parcae", setting(n_layers_in_coda=3), "must be even"),
    ("parcae", setting(recurrent_embedding_dimension=32), "recurrent_embedding_dimension = 32"),
    ("parcae", setting(logit_softcap=30.0), "logit_softcap = 30.0"),
    ("parcae", setting(rope_settings={"use_rope": False}), "rope_settings = "),
    ("retrofit_llama", setting(initial_state_mode="skip-adapter"), "initial_state_mode = "),
    ("xllm_huginn", setting(huginn_hierarchical_state="split_hl"), "huginn_hierarchical_state = "),
    ("xllm_huginn", setting(num_shared_experts=1), "num_shared_experts = 1"),
    ("xllm_ouro", setting(qknorm=True), "qknorm = True"),
    ("xllm_ouro", setting(dense_prelude_input_injection="diagonal"), "dense_prelude_input_inject"),
    ("xllm_raw_injection", setting(loop_start_layer=1), "loop_start_layer = 1"),
    ("xllm_huginn", setting(num_layers=5), "num_layers = 5"),
    # values of the wrong kind
    ("ouro", setting(hidden_size="48"), "hidden_size = '48': must be an integer"),
    ("ouro", setting(rms_norm_eps=True), "rms_norm_eps = True: must be a number"),
    ("ouro", without("vocab_size"), "vocab_size: missing, must be given"),
    ("ouro", setting(num_attention_heads=5), "num_kv_heads = 2: must divide num_heads = 5"),
    # tensors
    ("ouro", tensors(model__norm__weight=lambda x: None), "tensor model.norm.weight is missing"),
    ("ouro", tensors(model__norm__weight=lambda x: x[:-1]), "model.norm.weight has shape"),
    ("ouro", tensors(lm_head__weight=lambda x: x * math.inf), "lm_head.weight holds values"),
    ("ouro", tensors(lm_head__weight=lambda x: x.long()), "lm_head.weight has dtype I64"),
    ("ouro", adding("model.layers.9.bias", "model.norm.weight"), "model.layers.9.bias is not part"),
    (
        "huginn",
        adding("lm_head.weight", "transformer.wte.weight"),
        "differs from transf",
    ),
    ("huginn", tensors(transformer__adapter__weight=lambda x: x[:, :-1]), "adapter.weight: has sh"),
    ("huginn", setting(vocab_size=65), r"wte.weight has shape \[64, 48\] as embed.weight"),
    ("parcae", decay_of_one, "decay is 1, it must be below 1"),
]


@pytest.mark.parametrize(("name", "change", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_refused(name: str, change: Change, text: str, tmp_path: Path) -> None:
    folder = put(tmp_path, name, change)
    with pytest.raises(ConfigError, match=text) as error:
        openmythos.load(folder)
    assert "\n" not in str(error.value) and str(error.value).startswith(str(folder))


@given(name=st.sampled_from(sorted(CASES)), data=st.data())
def test_any_tensor_that_is_missing_or_renamed_is_named(
    name: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    key = data.draw(st.sampled_from(sorted(CASES[name].weights)))
    new = data.draw(st.sampled_from(["", f"{key}.x", f"module.{key}"]))

    def change(_config: dict[str, Any], weights: Weights) -> None:
        tensor = weights.pop(key)
        if new:
            weights[new] = tensor

    folder = put(tmp_path_factory.mktemp("tensor"), name, change)
    with pytest.raises(ConfigError, match=f"tensor {re.escape(key)} is missing"):
        open_source(folder).check_names()


SWITCHED_ON = st.one_of(
    *(st.just(True), st.integers(1), st.floats(0.1, 9), st.text("xyz", min_size=1)),
    st.lists(st.integers(), min_size=1),
)


@given(name=st.sampled_from(sorted(CASES)), value=SWITCHED_ON)
def test_an_unknown_option_that_is_on_is_refused(
    name: str, value: object, tmp_path_factory: pytest.TempPathFactory
) -> None:
    change = setting(use_novel_thing=value)
    folder = put(tmp_path_factory.mktemp("refused"), name, change)
    with pytest.raises(ConfigError, match="use_novel_thing"):
        open_source(folder)
    assert open_source(folder, ignore=["use_novel_thing"]).config


@pytest.mark.parametrize("value", [None, False, 0, "", [], {}])
def test_an_unknown_option_that_is_off_is_ignored(value: object, tmp_path: Path) -> None:
    open_source(put(tmp_path, "ouro", setting(use_novel_thing=value)))


def test_unknown_kinds_of_models(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ConfigError, match=r"'mamba'.*unknown kind of model; known: open"):
        openmythos.load(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "hrm_text"}')
    with pytest.raises(ConfigError, match="'hrm_text': is not implemented: two states"):
        openmythos.load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="must hold a JSON object"):
        openmythos.load(tmp_path)


def test_places_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not the folder of a run or of a model"):
        openmythos.load(tmp_path)
    with pytest.raises(ConfigError, match="no such folder or file"):
        openmythos.load(tmp_path / "missing")
    with pytest.raises(ConfigError, match="nor on the Hub"):
        find("nobody/nothing-of-this-name")


class Opens:
    """Code in a pickle, which must not run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("ran", "w"))


def test_pickles_run_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put(tmp_path, "parcae", lambda _config, _weights: None)
    (tmp_path / "model.safetensors").unlink()
    for data in (pickle.dumps({"x": Opens()}, protocol=2), b"", b"not a pickle"):
        (tmp_path / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin"):
            openmythos.load(tmp_path)
    torch.save({"x": Opens()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="holds more than tensors"):
        openmythos.load(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "", 3, "missing.safetensors"])
def test_an_index_names_files_of_its_own_folder(name: object, tmp_path: Path) -> None:
    put(tmp_path, "ouro", lambda _config, _weights: None)
    (tmp_path / "model.safetensors").unlink()
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(ConfigError, match=r"weight_map|is missing"):
        openmythos.load(tmp_path)


def test_damaged_files(tmp_path: Path) -> None:
    put(tmp_path, "ouro", lambda _config, _weights: None)
    for data in (b"", b"x" * 100, (tmp_path / "model.safetensors").read_bytes()[:-8]):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ConfigError, match="damaged"):
            openmythos.load(tmp_path)


@pytest.mark.parametrize("name", [found.name for found in FORMATS if found.write])
def test_a_model_that_a_format_cannot_represent(name: str, tmp_path: Path) -> None:
    if name == "openmythos":
        return
    with pytest.raises(ConfigError, match=f"format {name}: cannot represent"):
        save(OpenMythos(presets.tiny(), seed=0), tmp_path, name)
    assert not list(tmp_path.iterdir())


def test_a_format_names_what_it_cannot_represent(tmp_path: Path) -> None:
    folder = put(tmp_path, "ouro", lambda _config, _weights: None)
    model = openmythos.load(folder)
    with pytest.raises(ConfigError, match="format llama: cannot represent num_loops"):
        save(model, tmp_path / "x", "llama")
    with pytest.raises(ConfigError, match="format = 'onnx': must be one of openmythos, huginn"):
        save(model, tmp_path / "x", "onnx")


def test_every_format_reads_what_it_writes() -> None:
    """Also those without a reference: the tables of `references` cover all others."""
    known = {found.name for found in FORMATS if found.write}
    assert known == {
        *("openmythos", "huginn", "ouro", "llama", "retrofit", "parcae"),
        *("qwen3", "olmo2", "gemma", "nanbeige"),
    }
    own = next(found for found in FORMATS if found.name == "openmythos")
    assert own.write is not None
    config = presets.small()
    assert own.read(Fields(Path("x"), own.write(config))) == config
    assert isinstance(config, MythosConfig)
