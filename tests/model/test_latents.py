"""Latent positions: by hand, their gradients, rows of a batch, and in decoding."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from variants import SEQ, gradients, members, name_of, random_tokens, tiny_config, tiny_model

from openmythos.inference.generation import Request, latent_step, prefill, stream
from openmythos.model.mythos import OpenMythos
from openmythos.nn.grouped_query import GroupedQueryAttention
from openmythos.nn.value_embedding import GatedValueEmbeddings
from openmythos.recurrence.exit_rules import StateChangeExit
from openmythos.recurrence.halting import Halting

GROUPED = GroupedQueryAttention(num_heads=4, num_kv_heads=2)
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def mask_of(*rows: str) -> Tensor:
    """One string per row, "x" at a latent."""
    return torch.tensor([[c == "x" for c in row.ljust(SEQ, ".")] for row in rows])


def by_hand(model: OpenMythos, tokens: Tensor, columns: list[int]) -> Tensor:
    """Logits with latents at ascending columns: hooks read the head's input and set embeddings."""
    inputs: dict[int, Tensor] = {}
    seen: list[Tensor] = []

    def set_inputs(_module: Any, _args: Any, embedded: Tensor) -> Tensor:
        parts = [inputs.get(i, embedded[:, i]) for i in range(embedded.shape[1])]
        return torch.stack(parts, dim=1)

    hooks = [
        model.embed.register_forward_hook(set_inputs),
        model.norm.register_forward_hook(lambda _module, _args, out: seen.append(out)),
    ]
    for column in columns:
        model(tokens[:, :column])
        inputs[column] = seen[-1][:, -1]
    logits: Tensor = model(tokens).logits
    for hook in hooks:
        hook.remove()
    return logits


@pytest.mark.parametrize("halting", members(Halting), ids=name_of)
def test_logits_and_gradients_are_those_of_passes_by_hand(halting: Halting) -> None:
    model, tokens = tiny_model(tiny_config(halting=halting)), random_tokens(2)
    weights = torch.randn(2, SEQ, model.vocab_size)
    logits = by_hand(model, tokens, [4, 5, 8])
    (logits * weights)[:, 8:].sum().backward()
    wanted = gradients(model)
    model.zero_grad()
    found = model(tokens, latents=mask_of("....xx..x", "....xx..x")).logits
    torch.testing.assert_close(found, logits, **CLOSE)
    (found * weights)[:, 8:].sum().backward()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], atol=1e-4, rtol=1e-3, msg=name)
    plain = model(tokens).logits
    assert not torch.allclose(plain[:, 4:], found[:, 4:], atol=1e-3)


def test_gradients_pass_through_a_latent_alone() -> None:
    """With a window of 1 a position sees itself only: all it knows comes through its input."""
    config = tiny_config(attention=replace(GROUPED, window=1))
    model, tokens = tiny_model(config, scale=0.3), random_tokens(1)
    leaf = model.embed(tokens).detach().requires_grad_()
    hook = model.embed.register_forward_hook(
        lambda _module, args, _out: leaf[:, : args[0].shape[1]]
    )
    model(tokens, latents=mask_of("...xx")).logits[0, 4].square().sum().backward()
    hook.remove()
    assert leaf.grad is not None
    reached = leaf.grad[0].abs().sum(dim=1) > 0
    assert reached.tolist() == [i == 2 for i in range(SEQ)]


@torch.no_grad()
def test_no_latents_is_the_plain_model() -> None:
    model, tokens = tiny_model(tiny_config()), random_tokens(2)
    plain = model(tokens).logits
    assert torch.equal(model(tokens, latents=mask_of("", "")).logits, plain)


@torch.no_grad()
def test_rows_do_not_depend_on_each_other() -> None:
    """Rows with latents at other columns, of other numbers, and with padding."""
    model, tokens = tiny_model(tiny_config()), random_tokens(3)
    latents = mask_of("....xx", "", "......xxx.x")
    padding = [0, 2, 4]
    attention_mask = torch.arange(SEQ) >= torch.tensor(padding)[:, None]
    loops = torch.tensor([3, 1, 2])
    batch = model(tokens, latents=latents, attention_mask=attention_mask, num_loops=loops)
    for row, start in enumerate(padding):
        alone = model(
            tokens[row : row + 1, start:],
            latents=latents[row : row + 1, start:],
            num_loops=int(loops[row]),
        )
        torch.testing.assert_close(batch.logits[row, start:], alone.logits[0], **CLOSE)


@pytest.mark.parametrize("exits", [False, True])
@torch.no_grad()
def test_decoding_takes_latents_one_by_one(exits: bool) -> None:
    model, prompt = tiny_model(tiny_config(), scale=0.3), random_tokens(2)[:, :5]
    rule = {"exit_rule": StateChangeExit(threshold=0.4)} if exits else {}
    padding = torch.arange(5) >= torch.tensor([[0], [2]])
    tokens, mask = torch.cat((prompt, torch.zeros(2, 3, dtype=torch.long)), dim=1), padding
    latents = torch.arange(SEQ) // 5 == 1
    latents[8:] = False
    for _ in range(4):
        seq = tokens.shape[1]
        mask = torch.cat((padding, torch.ones(2, seq - 5, dtype=torch.bool)), dim=1)
        here = latents[:seq].expand(2, -1)
        out = model(tokens, latents=here, attention_mask=mask, num_loops=4, **rule)
        tokens = torch.cat((tokens, out.logits[:, -1:].argmax(dim=-1)), dim=1)
    request = Request(latent_steps=3, max_new_tokens=4, num_loops=4, prefill_chunk=2, **rule)  # type: ignore[arg-type]
    steps = list(stream(model, prompt, request, padding))
    assert torch.equal(torch.stack([step.tokens for step in steps], dim=1), tokens[:, 8:])
    plain = model.generate(prompt, max_new_tokens=4, num_loops=4, attention_mask=padding)
    assert not torch.equal(plain, tokens[:, 8:])


@torch.no_grad()
def test_reordered_rows_keep_their_latent() -> None:
    model, prompt, request = tiny_model(tiny_config()), random_tokens(2), Request(num_loops=2)
    found = []
    for order in ([0, 1], [1, 0]):
        cache = model.new_cache(2, SEQ + 1, num_loops=2)
        prefill(model, prompt, request, cache)
        cache.select_rows(torch.tensor(order))
        found.append(latent_step(model, request, cache)[0])
    torch.testing.assert_close(found[0], found[1].flip(0), **CLOSE)


def test_refusals() -> None:
    model, tokens = tiny_model(tiny_config()), random_tokens(2)
    with pytest.raises(ValueError, match="latents: a latent must follow another position"):
        model(tokens, latents=mask_of("x", ""))
    padding = torch.arange(SEQ) >= torch.tensor([[0], [2]])
    with pytest.raises(ValueError, match="latents: a latent must follow another position"):
        model(tokens, latents=mask_of("", "..x"), attention_mask=padding)
    with pytest.raises(ValueError, match=r"latents: is torch.int64 \[2, 12\], must be a mask"):
        model(tokens, latents=mask_of("", "").long())
    cache = model.new_cache(2, SEQ)
    with pytest.raises(ValueError, match=r"latents: with a cache, Request\(latent_steps"):
        model(tokens, latents=mask_of("", "..x"), cache=cache)
    with pytest.raises(ValueError, match="a latent follows a token"):
        latent_step(model, Request(num_loops=2), cache)
    looked_up = tiny_model(tiny_config(attention=GROUPED, value_embeddings=GatedValueEmbeddings()))
    with pytest.raises(ValueError, match="must be none where latents are used"):
        looked_up(tokens, latents=mask_of("..x", ""))
    with pytest.raises(ValueError, match="5 tokens and 20 new ones are longer"):
        stream(model, tokens[:, :5], Request(latent_steps=8, max_new_tokens=12))
