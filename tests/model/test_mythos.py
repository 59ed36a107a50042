"""The model's surface: what it refuses and how, saving and loading, generation, sampling."""

import errno
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from variants import (
    CACHE_POLICIES,
    FEW_VARIANT_IDS,
    FEW_VARIANTS,
    SEQ,
    VOCAB,
    assert_gradients_close,
    gradients,
    name_of,
    random_tokens,
    tiny_config,
    tiny_model,
)

from openmythos.config import ConfigError, from_dict, to_dict
from openmythos.inference.generation import Request, stream
from openmythos.inference.sampling import Sampling, filtered_logits, sample
from openmythos.model import storage
from openmythos.model.config import MythosConfig
from openmythos.model.mythos import OpenMythos
from openmythos.nn.cache import CachePolicy, ExactCache
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE
from openmythos.recurrence.exit_rules import KLExit, StateChangeExit
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.initial_state import NormalState
from openmythos.recurrence.injections import NoInjection

CONTEXT = 2 * SEQ


@pytest.fixture
def model() -> OpenMythos:
    return tiny_model(tiny_config())


@pytest.mark.parametrize(
    "data, message",
    [
        (
            {"dim": 30, "attention": {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 2}},
            "num_heads = 4: must divide dim = 30",
        ),
        (
            {"dim": 36, "attention": {"kind": "grouped_query", "num_heads": 4, "num_kv_heads": 4}},
            "head_dim = dim / num_heads = 9 must be even for rotary positions",
        ),
        (
            {"attention": {"kind": "grouped_query", "num_heads": 8, "num_kv_heads": 3}},
            "attention.num_kv_heads = 3: must divide num_heads = 8",
        ),
        (
            {"attention": {"kind": "latent", "kv_latent_dim": 10**9}},
            "attention.kv_latent_dim = 1000000000: must be an integer, at least 1 and at most",
        ),
        ({"dim": 10**9}, "dim = 1000000000: must be an integer, at least 1 and at most 1048576"),
        ({"num_loops": 10**9}, "num_loops = 1000000000: must be an integer"),
        ({"recurrent_feed_forward": {"kind": "moe", "num_experts": 10**6}}, "num_experts = 10000"),
        ({"recurrent_feed_forward": {"kind": "moe", "route_scale": 1e308}}, "route_scale = 1e+308"),
        ({"halting": {"kind": "act", "bias_init": 1e39}}, "halting.bias_init = 1e+39: must be a"),
        (
            {"recurrent_feed_forward": {"kind": "moe", "num_experts": 4, "top_k": 5}},
            "recurrent_feed_forward.top_k = 5: must be at most num_experts = 4",
        ),
        ({"num_loops": 0}, "num_loops = 0: must be an integer, at least 1"),
        ({"num_loops": -3}, "num_loops = -3: must be an integer, at least 1"),
        ({"num_loops": 2.5}, "num_loops = 2.5: must be an integer"),
        ({"num_loops": True}, "num_loops = True: must be an integer"),
        ({"recurrent_layers": 0}, "recurrent_layers = 0: must be an integer, at least 1"),
        ({"prelude_layers": -1}, "prelude_layers = -1: must be an integer, at least 0"),
        ({"vocab_size": 0}, "vocab_size = 0: must be an integer, at least 1"),
        ({"context": 0}, "context = 0: must be an integer, at least 1"),
        ({"norm_eps": 0.0}, "norm_eps = 0.0: must be a number, above 0"),
        (
            {"attention": {"kind": "MLA"}},
            "attention.kind = 'MLA': unknown kind, did you mean 'latent'?",
        ),
        (
            {"attention": {"kind": "latnet"}},
            "attention.kind = 'latnet': unknown kind, did you mean 'latent'?",
        ),
        (
            {"recurrent_feed_forward": "mo"},
            "recurrent_feed_forward.kind = 'mo': unknown kind, did you mean 'moe'?",
        ),
        ({"n_loops": 4}, "n_loops: unknown key, did you mean 'num_loops'?"),
        (
            {"attention": {"kind": "latent", "kv_latent": 8}},
            "attention.kv_latent: unknown key, did you mean 'kv_latent_dim'?",
        ),
        ({"state_init": "zero"}, "state_init.kind = 'zero': unknown kind, did you mean 'zeros'?"),
        (
            {"injection": {"kind": "none"}},
            'state_init = \'zeros\': must be "encoded" with injection "none"',
        ),
    ],
)
def test_impossible_configs_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_dict(MythosConfig, data)


def test_impossible_configs_are_refused_in_code_too() -> None:
    with pytest.raises(ConfigError, match="num_heads = 6: must divide dim = 32"):
        tiny_config(attention=GroupedQueryAttention(num_heads=6, num_kv_heads=2))
    with pytest.raises(ConfigError, match="top_k = 5: must be at most num_experts = 4"):
        MoE(num_experts=4, top_k=5)
    with pytest.raises(ConfigError, match="rope_head_dim = 3: must be even"):
        LatentAttention(rope_head_dim=3)
    with pytest.raises(ConfigError, match="state_init"):
        MythosConfig(injection=NoInjection())


def test_effective_depth_counts_executed_layers() -> None:
    config = tiny_config(prelude_layers=2, recurrent_layers=3, coda_layers=1)
    assert [config.effective_depth(loops) for loops in (1, 4)] == [6, 15]


@pytest.mark.parametrize(
    "num_loops",
    [
        *(0, -1, 2.5, True, "2", 10**26, torch.tensor([2]), torch.tensor([0, 1])),
        *(np.float64(2), torch.tensor(2.0), torch.tensor(True)),
        *(torch.tensor([1.0, 2.0]), torch.tensor([True, True])),
    ],
    ids=str,
)
def test_impossible_loops_are_refused(model: OpenMythos, num_loops: Any) -> None:
    with pytest.raises(ValueError, match=r"num_loops = .*must be"):
        model(random_tokens(2), num_loops=num_loops)


@pytest.mark.parametrize("three", [np.int64(3), torch.tensor(3)], ids=repr)
@torch.no_grad()
def test_loops_may_be_whole_numbers_of_any_library(model: OpenMythos, three: Any) -> None:
    tokens = random_tokens(2)
    assert torch.equal(model(tokens, num_loops=three).logits, model(tokens, num_loops=3).logits)
    found = model.generate(tokens, max_new_tokens=2, num_loops=three)
    assert torch.equal(found, model.generate(tokens, max_new_tokens=2, num_loops=3))


def test_loops_that_no_memory_holds_are_refused(model: OpenMythos) -> None:
    with pytest.raises(ConfigError, match=r"num_loops = 999999999: must be .* at most 1000000"):
        model.generate(random_tokens(1), max_new_tokens=1, num_loops=999_999_999)
    with pytest.raises(ValueError, match=r"cache: no room for .* GiB \(a batch of 1, "):
        model.new_cache(1, 2**20, num_loops=10**6)


@pytest.mark.parametrize("loops", [(0,), ("a",), (1, 99), (1.0,), (True,)], ids=str)
def test_loops_that_are_never_run_cannot_be_collected(model: OpenMythos, loops: Any) -> None:
    message = "collect_loops: holds .*, must hold whole numbers from 1 to num_loops = 4"
    for num_loops in (4, torch.tensor([4, 2])):
        with pytest.raises(ValueError, match=message):
            model(random_tokens(2), num_loops=num_loops, collect_loops=loops)


def test_a_config_must_be_one() -> None:
    with pytest.raises(TypeError, match="config: must be a MythosConfig"):
        OpenMythos({"dim": 32})  # type: ignore[arg-type]


def test_loops_per_sequence_go_with_neither_cache_nor_exit_rule(model: OpenMythos) -> None:
    loops, message = torch.tensor([1, 2]), "goes with neither a cache nor an exit rule"
    with pytest.raises(ValueError, match=message):
        model(random_tokens(2), num_loops=loops, cache=model.new_cache(2, SEQ))
    with pytest.raises(ValueError, match=message):
        model(random_tokens(2), num_loops=loops, exit_rule=StateChangeExit())


@pytest.mark.parametrize("backprop_loops", [-1, 1.5, True])
def test_impossible_backprop_loops_are_refused(model: OpenMythos, backprop_loops: Any) -> None:
    with pytest.raises(ValueError, match=r"backprop_loops = .*must be an integer"):
        model(random_tokens(2), backprop_loops=backprop_loops)


def test_arguments_of_the_wrong_shape_are_refused(model: OpenMythos) -> None:
    tokens = random_tokens(2)
    mask = torch.ones(2, SEQ - 1, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"attention_mask: has shape \[2, 11\]"):
        model(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask: has shape \[2, 11\]"):
        model.generate(tokens, max_new_tokens=1, attention_mask=mask)
    with pytest.raises(ValueError, match=r"tokens: has shape \[12\], must be"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"prompt: has shape \[12\], must be"):
        model.generate(tokens[0], max_new_tokens=1)
    for documents in (torch.zeros(1, SEQ, dtype=torch.long), torch.zeros(2, 1, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"documents: has shape \[., .+\], the tokens"):
            model(tokens, documents=documents)
    with pytest.raises(
        ValueError, match=r"documents: must hold whole numbers, holds torch.float32"
    ):
        model(tokens, documents=torch.full((2, SEQ), torch.nan))


def test_what_are_no_ids_is_refused(model: OpenMythos) -> None:
    tokens = random_tokens(2)
    for wrong, said in (
        (tokens.float(), r"must hold int64 or int32 ids, holds torch\.float32"),
        (tokens.short(), r"must hold int64 or int32 ids, holds torch\.int16"),
        (tokens.tolist(), "must be a tensor"),
    ):
        with pytest.raises(ValueError, match=f"tokens: {said}"):
            model(wrong)
        with pytest.raises(ValueError, match=f"prompt: {said}"):
            model.generate(wrong, max_new_tokens=1)
    with pytest.raises(ValueError, match=r"targets: must hold int64"):
        model.losses(tokens, tokens.float())
    assert torch.equal(model(tokens.int()).logits, model(tokens).logits)


@pytest.mark.parametrize("target", [-1, -99, VOCAB, 999])
def test_targets_outside_the_vocabulary_are_refused(model: OpenMythos, target: int) -> None:
    tokens = random_tokens(2)
    targets = tokens.clone()
    targets[0, :3] = -100
    model.losses(tokens, targets)
    targets[1, 3] = target
    with pytest.raises(ValueError, match=f"targets: id {target} is neither -100 .not counted"):
        model.losses(tokens, targets)


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]], ids=str)
def test_prompts_are_padded_on_the_left(model: OpenMythos, mask: list[int]) -> None:
    # The first row is right, so that one wrong row is enough.
    masks = torch.tensor([[0, 1, 1, 1], mask]).bool()
    with pytest.raises(ValueError, match="attention_mask: pad on the left"):
        model.generate(random_tokens(2, 4), max_new_tokens=1, attention_mask=masks)


@pytest.mark.parametrize("stop_id", [-1, VOCAB])
def test_a_stop_token_that_cannot_come_is_refused(model: OpenMythos, stop_id: int) -> None:
    with pytest.raises(ConfigError, match=f"stop_ids = {stop_id}: must be an integer"):
        model.generate(random_tokens(1), max_new_tokens=1, stop_id=stop_id)


@pytest.mark.parametrize("token", [-1, VOCAB, 10**6])
def test_ids_outside_the_vocabulary_are_refused(model: OpenMythos, token: int) -> None:
    tokens = random_tokens(2)
    tokens[1, 3] = token
    message = rf"tokens: id {token} is outside the vocabulary of {VOCAB} tokens"
    with pytest.raises(ValueError, match=message):
        model(tokens)
    with pytest.raises(ValueError, match=f"prompt: .* outside the vocabulary of {VOCAB} tokens"):
        model.generate(tokens, max_new_tokens=1)


def test_too_long_and_empty_inputs_are_refused(model: OpenMythos) -> None:
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens are longer than the context of"):
        model(random_tokens(1, CONTEXT + 1))
    with pytest.raises(ValueError, match="tokens: is empty"):
        model(random_tokens(1, 0))
    with pytest.raises(ValueError, match="tokens: is empty"):
        model(random_tokens(0))
    with pytest.raises(ValueError, match="prompt: is empty"):
        model.generate(random_tokens(1, 0), max_new_tokens=1)
    with pytest.raises(ValueError, match="prompt: is empty"):
        model.generate(random_tokens(0), max_new_tokens=1)
    message = f"20 tokens and 5 new ones are longer than the context of {CONTEXT}"
    with pytest.raises(ValueError, match=message):
        # Before the first token, not in the middle of the stream.
        stream(model, random_tokens(1, 20), Request(max_new_tokens=5))
    assert model.generate(random_tokens(1, 20), max_new_tokens=4).shape == (1, 4)


def test_a_cache_that_does_not_fit_is_refused(model: OpenMythos) -> None:
    cache = model.new_cache(2, 8, num_loops=3)
    with pytest.raises(ValueError, match="was made for a batch of 2, not of 3"):
        model(random_tokens(3, 4), cache=cache)
    with pytest.raises(ValueError, match="0 \\+ 9 new tokens exceed its capacity of 8"):
        model(random_tokens(2, 9), cache=cache)
    with pytest.raises(ValueError, match="num_loops = 4: the cache was made for at most 3 loops"):
        model(random_tokens(2, 4), num_loops=4, cache=cache)
    with pytest.raises(ValueError, match="documents: packed rows and a cache"):
        documents = torch.zeros(2, 4, dtype=torch.long)
        model(random_tokens(2, 4), documents=documents, cache=cache)
    model(random_tokens(2, 8), cache=cache)
    cache.advance(8)
    with pytest.raises(ValueError, match="8 \\+ 1 new tokens exceed"):
        model(random_tokens(2, 1), cache=cache)


@torch.no_grad()
def test_default_loops_come_from_the_config(model: OpenMythos) -> None:
    out = model(random_tokens(2))
    assert (out.recurrence.loops_used == model.config.num_loops).all()
    assert out.logits.shape == (2, SEQ, VOCAB)


@torch.no_grad()
def test_a_packed_row_may_be_longer_than_the_context(model: OpenMythos) -> None:
    """Each document fits; a longer one does not."""
    tokens = random_tokens(1, CONTEXT + 4)
    documents = (torch.arange(CONTEXT + 4) >= CONTEXT).long()[None]
    packed = model(tokens, documents=documents).logits
    alone = model(tokens[:, CONTEXT:]).logits
    torch.testing.assert_close(packed[:, CONTEXT:], alone, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=f"{CONTEXT + 1} tokens are longer than the context of"):
        model(tokens, documents=documents * 0 + (torch.arange(CONTEXT + 4) > CONTEXT))


def test_packed_documents_do_not_see_each_other(model: OpenMythos) -> None:
    tokens, documents = random_tokens(2), torch.tensor([[0] * 5 + [1] * 4 + [2] * 3] * 2)
    packed = model(tokens, documents=documents).logits
    for start, stop in ((0, 5), (5, 9), (9, 12)):
        alone = model(tokens[:, start:stop]).logits
        torch.testing.assert_close(packed[:, start:stop], alone, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("coda_layers", [0, 1, 2])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("window", [0, 4])
def test_last_only_is_the_last_of_all(coda_layers: int, padded: bool, window: int) -> None:
    attention = replace(tiny_config().attention, window=window)
    model = tiny_model(tiny_config(coda_layers=coda_layers, attention=attention)).eval()
    tokens = random_tokens(2)
    mask = torch.arange(SEQ) >= torch.tensor([[0], [3 if padded else 0]])
    full, last = (
        model(tokens, num_loops=3, attention_mask=mask, collect_loops=(1,), last_only=only)
        for only in (False, True)
    )
    assert last.logits.shape == (2, 1, VOCAB)
    torch.testing.assert_close(last.logits, full.logits[:, -1:])
    torch.testing.assert_close(last.loop_logits[1], full.loop_logits[1][:, -1:])
    caches = [model.new_cache(2, SEQ + 1, num_loops=3) for _ in range(2)]
    for cache, only in zip(caches, (False, True), strict=True):
        model(tokens, num_loops=3, attention_mask=mask, cache=cache, last_only=only)
        cache.advance(SEQ)
    after = [model(tokens[:, :1], num_loops=3, cache=cache).logits for cache in caches]
    assert after[0].equal(after[1])


def test_a_tied_head_is_the_embedding() -> None:
    tied, untied = (OpenMythos(tiny_config(tie_embeddings=tie)) for tie in (True, False))
    assert "head.weight" not in tied.state_dict()
    assert untied.state_dict()["head.weight"].shape == (VOCAB, 32)
    extra = sum(p.numel() for p in untied.parameters()) - sum(p.numel() for p in tied.parameters())
    assert extra == VOCAB * 32


@pytest.fixture
def saved(model: OpenMythos, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def test_a_saved_model_is_two_readable_files(model: OpenMythos, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["config.json", "model.safetensors"]
    config = json.loads((saved / "config.json").read_text())
    assert config.pop("model_type") == "openmythos"
    assert config.pop("format_version") == storage.FORMAT_VERSION
    assert config == json.loads(json.dumps(to_dict(model.config)))
    assert load_file(saved / "model.safetensors").keys() == model.state_dict().keys()


def test_bf16_weights_stay_bf16(model: OpenMythos, tmp_path: Path) -> None:
    model.to(torch.bfloat16).save_pretrained(tmp_path / "deep" / "folder")
    loaded = OpenMythos.from_pretrained(tmp_path / "deep" / "folder")
    assert all(p.dtype == torch.bfloat16 for p in loaded.parameters())
    found = loaded.state_dict()
    assert all(torch.equal(found[name], w) for name, w in model.state_dict().items())


def test_a_loaded_model_can_be_trained(saved: Path) -> None:
    model = OpenMythos.from_pretrained(saved).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.embed.weight.detach().clone()
    model(random_tokens(2)).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(model.embed.weight, before)
    # And the file is no longer tied to it.
    assert torch.equal(OpenMythos.from_pretrained(saved).embed.weight, before)


def edit_weights(folder: Path, edit: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def remove(tensors: dict[str, Tensor]) -> None:
    del tensors["norm.weight"]


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"] = torch.ones(33)


def poison(tensors: dict[str, Tensor]) -> None:
    tensors["embed.weight"][7, 3] = torch.nan


def whole_numbers(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"] = torch.ones(32, dtype=torch.int64)


def add(tensors: dict[str, Tensor]) -> None:
    tensors["extra.weight"] = torch.ones(2)


@pytest.mark.parametrize(
    "edit, message",
    [
        (remove, "tensor norm.weight is missing"),
        (reshape, "tensor norm.weight has shape [33], the config wants [32]"),
        (poison, "tensor embed.weight holds values that are not finite"),
        (whole_numbers, "tensor norm.weight has dtype torch.int64, not a float"),
        (add, "tensor extra.weight is not part of this model"),
    ],
)
def test_weights_that_do_not_fit_are_refused(saved: Path, edit: Any, message: str) -> None:
    edit_weights(saved, edit)
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        OpenMythos.from_pretrained(saved)
    assert str(saved / "model.safetensors") in str(error.value)


def test_what_could_not_be_loaded_is_not_saved(model: OpenMythos, tmp_path: Path) -> None:
    with torch.no_grad():
        model.norm.weight[3] = torch.inf
    with pytest.raises(ConfigError, match=r"norm\.weight holds values that are not finite"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ConfigError, match=r"model\.safetensors: is damaged or no safetensors"):
        OpenMythos.from_pretrained(saved)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 a pickle in a zip", b"\x80\x02}q\x00.", b"{}" * 40]
)
def test_foreign_weights_are_refused(saved: Path, content: bytes) -> None:
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(ConfigError, match=r"model\.safetensors: is damaged or no safetensors"):
        OpenMythos.from_pretrained(saved)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "is not the config of an OpenMythos model"),
        ({"model_type": None}, "is not the config of an OpenMythos model"),
        ({"format_version": 99}, "format_version = 99: must be 1"),
        ({"dims": 8}, "dims: unknown key, did you mean 'dim'?"),
        ({"dim": -8}, "dim = -8: must be an integer, at least 1"),
        ({"vocab_size": 60}, "embed.weight has shape [50, 32], the config wants [60, 32]"),
    ],
)
def test_foreign_configs_are_refused(saved: Path, changes: Any, message: str) -> None:
    path = saved / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=re.escape(message)) as error:
        OpenMythos.from_pretrained(saved)
    assert str(saved) in str(error.value)


def test_missing_files_are_named(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"model\.safetensors: is missing"):
        OpenMythos.from_pretrained(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json: not valid JSON"):
        OpenMythos.from_pretrained(saved)
    with pytest.raises(ConfigError, match=r"nowhere.config\.json: cannot be read: No such file"):
        OpenMythos.from_pretrained(saved / "nowhere")


def disk_full(wrapped: bool) -> Any:
    def fail(tensors: dict[str, Tensor], path: Path) -> NoReturn:
        Path(path).write_bytes(b"half of the")
        if wrapped:  # as the library reports it
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    return fail


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_full_disk_leaves_the_old_model(
    saved: Path, wrapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = {path.name: path.read_bytes() for path in saved.iterdir()}
    other = tiny_model(tiny_config(), seed=5)
    monkeypatch.setattr(storage, "save_file", disk_full(wrapped))
    with pytest.raises(OSError, match="No space left on device"):
        other.save_pretrained(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == old
    OpenMythos.from_pretrained(saved)


def test_saving_replaces_the_old_model(saved: Path, tmp_path: Path) -> None:
    other = tiny_model(tiny_config(), seed=5)
    other.save_pretrained(saved)
    assert torch.equal(OpenMythos.from_pretrained(saved).embed.weight, other.embed.weight)
    assert len(list(saved.iterdir())) == 2


def test_a_folder_can_be_moved(saved: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.move(saved / name, moved / name)
    OpenMythos.from_pretrained(str(moved))


@torch.no_grad()
def greedy_by_hand(model: OpenMythos, prompt: Tensor, new: int, num_loops: int) -> Tensor:
    tokens = prompt
    for _ in range(new):
        logits = model(tokens, num_loops=num_loops).logits[:, -1]
        tokens = torch.cat((tokens, logits.argmax(-1, keepdim=True)), dim=1)
    return tokens[:, prompt.shape[1] :]


@pytest.mark.parametrize("prefill_chunk", [0, 1, 5])
@pytest.mark.parametrize("halting", [tiny_config().halting, ACT(bias_init=-0.5)], ids=name_of)
def test_temperature_zero_is_greedy_without_a_cache(halting: Any, prefill_chunk: int) -> None:
    model, prompt = tiny_model(tiny_config(halting=halting)), random_tokens(3)
    request = Request(max_new_tokens=8, num_loops=4, prefill_chunk=prefill_chunk)
    steps = list(stream(model, prompt, request))
    tokens = torch.stack([step.tokens for step in steps], dim=1)
    assert torch.equal(tokens, greedy_by_hand(model, prompt, 8, 4))
    assert all(step.loops_used.shape == (3,) for step in steps)


def test_padded_prompts_generate_as_alone(model: OpenMythos) -> None:
    prompt = random_tokens(3)
    lengths = [12, 7, 3]
    mask = torch.stack([torch.arange(SEQ) >= SEQ - length for length in lengths])
    for chunk in (0, 5):
        request = Request(max_new_tokens=6, num_loops=3, prefill_chunk=chunk)
        steps = [step.tokens for step in stream(model, prompt, request, mask)]
        for row, length in enumerate(lengths):
            alone = model.generate(prompt[row : row + 1, -length:], max_new_tokens=6, num_loops=3)
            assert torch.stack(steps, dim=1)[row].tolist() == alone[0].tolist()


def test_generation_in_training_mode_is_that_of_eval_mode_and_restores_it() -> None:
    model = tiny_model(tiny_config(state_init=NormalState(), halting=ACT()))
    prompt = random_tokens(2)
    expected = model.generate(prompt, max_new_tokens=5)
    model.train()
    assert torch.equal(model.generate(prompt, max_new_tokens=5), expected)
    assert all(module.training for module in model.modules())
    steps = stream(model, prompt, Request(max_new_tokens=5))
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert all(module.training for module in model.modules())
    model.eval()
    model.generate(prompt, max_new_tokens=1)
    assert not any(module.training for module in model.modules())


def test_threads_may_generate_with_a_model_in_training() -> None:
    model, prompt = tiny_model(tiny_config(state_init=NormalState())), random_tokens(2)
    rule = StateChangeExit(threshold=0.12)
    expected = model.generate(prompt, max_new_tokens=4, exit_rule=rule)
    model.train()
    with ThreadPoolExecutor(4) as pool:
        run = partial(model.generate, prompt, max_new_tokens=4, exit_rule=rule)
        found = [future.result() for future in [pool.submit(run) for _ in range(8)]]
    assert all(torch.equal(tokens, expected) for tokens in found)
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_refused(model: OpenMythos, temperature: float) -> None:
    sampling = Sampling(temperature=temperature)
    for wrong in (torch.nan, torch.inf):
        with torch.no_grad():
            model.norm.weight[3] = wrong
        with pytest.raises(ValueError, match="logits: are not finite"):
            model.generate(random_tokens(2), max_new_tokens=2, sampling=sampling)


def test_nothing_is_made_on_the_default_device_but_the_draw(model: OpenMythos) -> None:
    """On an accelerator a tensor that is made without a device would be on the CPU.

    Here the model is on the CPU and the default is meta, where any such tensor fails the pass.
    """
    prompt, mask = random_tokens(2), torch.arange(SEQ) >= torch.tensor([[3], [0]])
    configs = [
        {"state_init": NormalState(), "halting": ACT(bias_init=-1.0), "coda_layers": 2},
        {"recurrent_feed_forward": MoE(num_experts=4, expert_dim=16)},
        {"attention": GroupedQueryAttention(num_heads=4, num_kv_heads=2, window=4)},
    ]
    for parts in configs:
        model = tiny_model(tiny_config(**parts))
        for rule in (None, KLExit(threshold=0.002, scope="prefix")):
            options = {"max_new_tokens": 3, "attention_mask": mask, "exit_rule": rule}
            expected = model.generate(prompt, **options, sampling=Sampling(temperature=1.0))
            with torch.device("meta"):
                found = model.generate(prompt, **options, sampling=Sampling(temperature=1.0))
            assert torch.equal(found, expected)
        depths = torch.tensor([3, 1])
        with torch.device("meta"):
            losses = model.train().losses(prompt, prompt, num_loops=depths, documents=prompt * 0)
            losses.cross_entropy.backward()


@pytest.mark.gpu
@pytest.mark.parametrize("config", FEW_VARIANTS, ids=FEW_VARIANT_IDS)
def test_a_gpu_decodes_and_trains_as_a_cpu(config: MythosConfig) -> None:
    model, tokens = tiny_model(config), random_tokens(2)
    rule = KLExit(threshold=0.002)
    results = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad()
        found = model(tokens.to(device), num_loops=3)
        loss = model.losses(tokens.to(device), tokens.to(device), num_loops=3).cross_entropy
        loss.backward()
        generated = model.generate(tokens, max_new_tokens=3, exit_rule=rule)
        assert generated.device.type == device
        grads = {name: grad.cpu() for name, grad in gradients(model).items()}
        results.append((found.logits.detach().cpu(), loss.detach().cpu(), grads))
    (logits, loss, grads), (on_gpu, gpu_loss, gpu_grads) = results
    torch.testing.assert_close(on_gpu, logits, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(gpu_loss, loss, rtol=1e-3, atol=1e-3)
    assert_gradients_close(gpu_grads, grads)


def test_generation_keeps_no_graph(model: OpenMythos) -> None:
    steps = stream(model, random_tokens(1), Request(max_new_tokens=2))
    for _ in steps:
        assert torch.is_grad_enabled()
    tokens = model.generate(random_tokens(1), max_new_tokens=2)
    assert not tokens.requires_grad


def test_a_row_ends_at_its_stop_token(model: OpenMythos) -> None:
    prompt = random_tokens(4)
    free = model.generate(prompt, max_new_tokens=8)
    stop = int(free[0, 2])
    stopped = model.generate(prompt, max_new_tokens=8, stop_id=stop)
    ends = []
    for ours, theirs in zip(free.tolist(), stopped.tolist(), strict=True):
        end = ours.index(stop) + 1 if stop in ours else 8
        ends.append(end)
        kept = min(end, len(theirs))
        assert theirs[:kept] == ours[:kept]
        assert set(theirs[kept:]) <= {stop}
    assert stopped.shape[1] == max(ends)
    assert min(ends) < 8
    one = model.generate(prompt[:1], max_new_tokens=8, stop_id=stop)
    assert one.tolist() == [free[0, : ends[0]].tolist()]


def test_no_new_tokens(model: OpenMythos) -> None:
    assert model.generate(random_tokens(2), max_new_tokens=0).shape == (2, 0)


def test_seeds_decide_what_is_drawn(model: OpenMythos) -> None:
    prompt = random_tokens(2)

    def drawn(seed: int) -> list[list[int]]:
        sampling = Sampling(temperature=1.5, seed=seed)
        tokens = model.generate(prompt, max_new_tokens=8, sampling=sampling)
        torch.rand(1)
        return tokens.tolist()

    assert drawn(0) == drawn(0)
    assert len({str(drawn(seed)) for seed in range(4)}) == 4


@pytest.mark.parametrize("decode", CACHE_POLICIES, ids=name_of)
@torch.no_grad()
def test_prompt_and_new_tokens_follow_their_cache_policies(
    model: OpenMythos, decode: CachePolicy
) -> None:
    prompt, seen = random_tokens(2), []
    # What the head reads: generation calls the model by its parts.
    hook = model.norm.register_forward_hook(lambda _m, _a, x: seen.append(model.logits(x)))
    request = Request(max_new_tokens=5, num_loops=9, prefill=ExactCache(), decode=decode)
    tokens = [step.tokens for step in stream(model, prompt, request)]
    hook.remove()
    cache = model.new_cache(2, SEQ + 5, num_loops=9, decode=decode)
    for index, part in enumerate((prompt, *(t[:, None] for t in tokens[:-1]))):
        logits = model(part, num_loops=9, cache=cache).logits
        cache.advance(part.shape[1])
        cache.begin_decode()
        torch.testing.assert_close(logits[:, -1:], seen[index])
        assert torch.equal(logits[:, -1].argmax(-1), tokens[index])
    exact = model(torch.cat((prompt, torch.stack(tokens[:-1], dim=1)), dim=1), num_loops=9).logits
    same = torch.allclose(exact[:, -1], logits[:, -1], atol=1e-4)
    assert same == isinstance(decode, ExactCache)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"max_new_tokens": -1}, "max_new_tokens = -1: must be an integer, at least 0"),
        ({"num_loops": 0}, "num_loops = 0: must be an integer, at least 1"),
        ({"prefill_chunk": -1}, "prefill_chunk = -1: must be an integer, at least 0"),
    ],
)
def test_impossible_requests_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(**fields)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"temperature": -1.0}, "temperature = -1.0: must be a number, at least 0"),
        ({"top_k": -1}, "top_k = -1: must be an integer, at least 0"),
        ({"top_p": 0.0}, "top_p = 0.0: must be a number, above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p = 1.5: must be a number, above 0 and at most 1"),
        ({"min_p": -0.5}, "min_p = -0.5: must be a number, at least 0 and at most 1"),
        ({"seed": -1}, "seed = -1: must be an integer, at least 0"),
        ({"seed": 2**70}, "seed = 1180591620717411303424: must be an integer"),
    ],
)
def test_impossible_sampling_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**fields)


def test_more_candidates_than_tokens_are_refused(model: OpenMythos) -> None:
    with pytest.raises(ConfigError, match="top_k = 51: must be an integer"):
        model.generate(random_tokens(1), max_new_tokens=1, sampling=Sampling(top_k=51))
    sampling = Sampling(top_k=50, temperature=1.0)
    assert model.generate(random_tokens(1), max_new_tokens=1, sampling=sampling).shape == (1, 1)


def kept_by_hand(logits: list[float], s: Sampling) -> list[float]:
    """Probabilities after temperature, top-k, top-p and min-p, in plain Python floats."""
    hottest = max(logits)
    weights = [2.718281828459045 ** ((x - hottest) / s.temperature) for x in logits]
    order = sorted(range(len(logits)), key=lambda i: -weights[i])
    if s.top_k:
        weights = [w if i in order[: s.top_k] else 0.0 for i, w in enumerate(weights)]
    total, before, kept = sum(weights), 0.0, []
    for i in order:
        if before / total < s.top_p and weights[i] > 0:
            kept.append(i)
        before += weights[i]
    weights = [w if i in kept else 0.0 for i, w in enumerate(weights)]
    weights = [w if w >= s.min_p * max(weights) else 0.0 for w in weights]
    return [w / sum(weights) for w in weights]


@given(
    st.lists(st.integers(-40, 40), min_size=12, max_size=12, unique=True),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.integers(0, 12),
    st.sampled_from([0.05, 0.33, 0.71, 0.97, 1.0]),
    st.sampled_from([0.0, 0.013, 0.21, 0.77, 1.0]),
)
def test_filters_by_their_definitions(
    tenths: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = [x / 10 + i / 1000 for i, x in enumerate(tenths)]
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    found = filtered_logits(torch.tensor([logits] * 2), sampling).softmax(dim=-1)
    expected = torch.tensor([kept_by_hand(logits, sampling)] * 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2**32))
def test_the_most_likely_token_is_never_dropped(seed: int) -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(seed)) * 30
    for sampling in (
        Sampling(temperature=1e-3, top_p=1e-9),
        Sampling(temperature=0.7, top_k=1),
        Sampling(temperature=100.0, min_p=1.0),
    ):
        drawn = sample(logits, sampling, torch.Generator().manual_seed(seed))
        assert torch.equal(drawn, logits.argmax(-1))


def test_samples_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    sampling = Sampling(temperature=0.8, top_k=4)
    generator, size = torch.Generator().manual_seed(0), 20_000
    drawn = sample(logits.expand(size, 5), sampling, generator).bincount(minlength=5) / size
    expected = filtered_logits(logits, sampling).softmax(-1)[0]
    assert expected[3] == drawn[3] == 0
    assert ((drawn - expected).abs() < 5 * (expected * (1 - expected) / size).sqrt() + 1e-9).all()


@pytest.mark.parametrize("temperature", [1e-320, 1e-46, 1e-40, 1e-12, 1e12])
def test_any_temperature_gives_probabilities(temperature: float) -> None:
    logits = torch.tensor([[3.0, -2.0, 2.999, 3e4]])
    probability = filtered_logits(logits, Sampling(temperature=temperature)).softmax(dim=-1)
    expected = [0.25] * 4 if temperature > 1 else [0.0, 0.0, 0.0, 1.0]
    torch.testing.assert_close(probability, torch.tensor([expected]))


def test_greedy_draws_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    logits = torch.randn(4, 9)
    assert torch.equal(sample(logits, Sampling(), generator), logits.argmax(-1))
    assert torch.equal(generator.get_state(), state)


def test_sampling_from_bf16_logits_is_done_in_fp32() -> None:
    logits = torch.randn(2, 9, dtype=torch.bfloat16)
    filtered = filtered_logits(logits, Sampling(temperature=1.0, top_p=0.5))
    assert filtered.dtype == torch.float32
