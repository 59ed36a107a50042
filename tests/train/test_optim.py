"""Which parameter gets which optimiser; Muon on stacked experts; schedules."""

import re
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from variants import FEW_VARIANT_IDS, FEW_VARIANTS, members, tiny_config

from openmythos.config import ConfigError
from openmythos.model.mythos import OpenMythos
from openmythos.nn.feed_forward import SwiGLU
from openmythos.recurrence.halting import ACT
from openmythos.recurrence.loop_embedding import LoopEmbedding
from openmythos.recurrence.loop_lora import LoopLoRA
from openmythos.train.optim import (
    AdamW,
    Cosine,
    Linear,
    Muon,
    Optimizer,
    Optimizers,
    Schedule,
)

# Everything that must never decay, said independently of the table in the code.
NEVER_DECAYED = re.compile(
    r"embed\.|head\.|norm\.weight$|\.router\.|\.injection\.|\.conditioning\.|\.halting\.|bias$"
)
STEPS = 50


def rich_model() -> OpenMythos:
    """A model with a parameter of every sort."""
    return OpenMythos(
        tiny_config(
            halting=ACT(),
            loop_lora=LoopLoRA(rank=2, num_loops=2),
            loop_embedding=LoopEmbedding(num_loops=2),
            tie_embeddings=False,
        ),
        seed=0,
    )


def torch_optimizers(optimizers: Optimizers) -> list[torch.optim.Optimizer]:
    return optimizers._optimizers


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("choice", get_args(Optimizer))
@pytest.mark.parametrize("config", FEW_VARIANTS, ids=FEW_VARIANT_IDS)
def test_every_parameter_is_in_exactly_one_group(choice: Any, config: Any) -> None:
    model = OpenMythos(config, seed=0)
    held: dict[int, int] = {}
    for optimizer in torch_optimizers(choice().build(model)):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                start = parameter.data_ptr()
                assert start not in held
                held[start] = parameter.numel()
    for name, parameter in model.named_parameters():
        # A stacked weight is held as its matrices, one behind the other.
        start, end = parameter.data_ptr(), parameter.data_ptr() + 4 * parameter.numel()
        covered = sum(size for at, size in held.items() if start <= at < end)
        assert covered == parameter.numel(), name
    assert sum(held.values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("choice", get_args(Optimizer))
def test_only_matrices_of_layers_decay(choice: Any) -> None:
    model = rich_model()
    decayed = {
        parameter.data_ptr()
        for optimizer in torch_optimizers(choice(weight_decay=0.1).build(model))
        for group in optimizer.param_groups
        if group["weight_decay"] > 0
        for parameter in group["params"]
    }
    names = [name for name, p in model.named_parameters() if p.data_ptr() in decayed]
    rest = [name for name, p in model.named_parameters() if p.data_ptr() not in decayed]
    assert not [name for name in names if NEVER_DECAYED.search(name)]
    assert not [name for name in rest if not NEVER_DECAYED.search(name)]
    assert any("experts.gate_up" in name for name in names)
    assert any("experts.down" in name for name in names)


def test_adamw_decays_the_embedding_too_where_asked() -> None:
    model = rich_model()
    before = model.embed.weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    AdamW(lr=0.1, weight_decay=0.5, decay_embeddings=True).build(model).step(1.0)
    torch.testing.assert_close(model.embed.weight.detach(), 0.95 * before)


def test_weight_decay_shrinks_what_has_no_gradient_signal() -> None:
    model = rich_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    AdamW(lr=0.1, weight_decay=0.5).build(model).step(1.0)
    for name, parameter in model.named_parameters():
        factor = 1.0 if NEVER_DECAYED.search(name) else 0.95
        torch.testing.assert_close(parameter.detach(), factor * before[name], msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_muon_steps_as_torch_does(dtype: torch.dtype) -> None:
    """Every matrix, each of a stack too: equal bits in bf16, which torch's own always uses."""
    model = rich_model()
    settings: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9}
    optimizers = Muon(**settings).build(model, dtype)
    muon, _ = torch_optimizers(optimizers)
    weights = [p for group in muon.param_groups for p in group["params"]]
    assert {p.ndim for p in weights} == {2, 3}
    assert len({bool(p.shape[-2] > p.shape[-1]) for p in weights}) == 2
    alone = [[nn.Parameter(m.clone()) for m in matrices_of(p.detach())] for p in weights]
    start = [p.detach().clone() for p in weights]
    reference = torch.optim.Muon(
        [m for parts in alone for m in parts], adjust_lr_fn="match_rms_adamw", **settings
    )
    for step in range(3):
        give_gradients(model, step)
        for weight, parts in zip(weights, alone, strict=True):
            assert weight.grad is not None
            for part, share in zip(parts, matrices_of(weight.grad), strict=True):
                part.grad = share.clone()
        reference.step()
        optimizers.step(1.0)
    for weight, before, parts in zip(weights, start, alone, strict=True):
        wanted = torch.stack([p.detach() for p in parts]).view_as(weight)
        if dtype == torch.bfloat16:
            assert torch.equal(weight.detach(), wanted)
        else:
            difference = (weight.detach() - wanted).norm() / (wanted - before).norm()
            assert 0 < difference < 0.03


def matrices_of(weight: Tensor) -> list[Tensor]:
    return list(weight.view(-1, *weight.shape[-2:]))


def test_muon_leaves_what_has_no_gradient() -> None:
    model = rich_model()
    optimizers = Muon().build(model)
    give_gradients(model, 0)
    name, left = next((n, p) for n, p in model.named_parameters() if ".experts.down" in n)
    left.grad, before = None, left.detach().clone()
    optimizers.step(1.0)
    assert torch.equal(left.detach(), before)
    assert not [saved for saved in optimizers.tensors() if saved.startswith(name)]


def test_muon_saves_stacks_by_matrix() -> None:
    """As runs of the first version have them."""
    model = rich_model()
    optimizers = Muon().build(model)
    give_gradients(model, 0)
    optimizers.step(1.0)
    stacks = {n: p for n, p in model.named_parameters() if ".experts." in n}
    saved = optimizers.tensors()
    for name, stack in stacks.items():
        for number, matrix in enumerate(stack):
            assert saved[f"{name}.{number}.momentum_buffer"].shape == matrix.shape


@pytest.mark.parametrize("config", [tiny_config(), tiny_config(recurrent_feed_forward=SwiGLU())])
@pytest.mark.parametrize("kinds", [(AdamW(), Muon()), (Muon(), AdamW())])
def test_state_of_another_optimizer_has_no_place(config: Any, kinds: Any) -> None:
    model = OpenMythos(config, seed=0)
    saved, other = (kind.build(model) for kind in kinds)
    give_gradients(model, 0)
    saved.step(1.0)
    with pytest.raises(ConfigError, match="optimizer: has no place for the saved"):
        other.allocate_state(saved.tensors())


def test_adamw_lr_scale_is_for_adamw_only() -> None:
    muon, adamw = torch_optimizers(Muon(lr=0.01, adamw_lr_scale=3.0).build(rich_model()))
    assert muon.param_groups[0]["lr"] == pytest.approx(0.01)
    assert adamw.param_groups[0]["lr"] == pytest.approx(0.03)


@pytest.mark.parametrize("choice", members(Optimizer), ids=lambda choice: choice.kind)
def test_state_round_trip_continues_bit_for_bit(choice: Any) -> None:
    straight, resumed = rich_model(), rich_model()
    optimizers = choice.build(straight)
    for step in range(2):
        give_gradients(straight, step)
        optimizers.step(0.5)
    state = {name: value.clone() for name, value in optimizers.tensors().items()}
    resumed.load_state_dict(straight.state_dict())
    again = choice.build(resumed)
    again.allocate_state(state)
    assert again.tensors().keys() == state.keys()
    for name, value in again.tensors().items():
        value.copy_(state[name])
    for model, held in ((straight, optimizers), (resumed, again)):
        give_gradients(model, 9)
        held.step(1.0)
    for name, weight in straight.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


@pytest.mark.parametrize("choice", members(Optimizer), ids=lambda choice: choice.kind)
def test_scale_multiplies_every_rate_once(choice: Any) -> None:
    model = rich_model()
    optimizers = choice.build(model)
    base = [g["lr"] for o in torch_optimizers(optimizers) for g in o.param_groups]
    for scale in (0.5, 0.25, 1.0):
        give_gradients(model, 0)
        optimizers.step(scale)
        now = [g["lr"] for o in torch_optimizers(optimizers) for g in o.param_groups]
        assert now == pytest.approx([scale * lr for lr in base])


def test_weight_decay_falls_to_its_end_beside_the_rate() -> None:
    model = rich_model()
    optimizers = Muon(weight_decay=0.4, final_decay=0.25).build(model)
    base = [g["weight_decay"] for o in torch_optimizers(optimizers) for g in o.param_groups]
    assert max(base) == 0.4
    for progress, share in ((0.0, 1.0), (0.5, 0.625), (1.0, 0.25)):
        give_gradients(model, 0)
        optimizers.step(0.1, progress)
        now = [g["weight_decay"] for o in torch_optimizers(optimizers) for g in o.param_groups]
        assert now == pytest.approx([share * decay for decay in base])
    with pytest.raises(ConfigError, match="final_decay = -1"):
        Muon(final_decay=-1.0)


@pytest.mark.parametrize("warmup", [0.0, 0.2])
@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_schedule_rises_then_falls_to_its_end(schedule: Any, warmup: float) -> None:
    chosen = schedule(warmup=warmup, final=0.1)
    scales = [chosen.scale(step, STEPS) for step in range(STEPS)]
    rising = round(warmup * STEPS)
    assert all(0 < scale <= 1 + 1e-12 for scale in scales)
    for step in range(max(0, rising - 1)):
        assert scales[step] == pytest.approx((step + 1) / rising)
    falling = scales[max(0, rising - 1) :]
    assert falling == sorted(falling, reverse=True)
    end = 1.0 if chosen.kind == "constant" else 0.1
    assert scales[-1] == pytest.approx(end)


def test_wsd_stays_until_its_decay() -> None:
    (wsd,) = (s for s in get_args(Schedule) if s().kind == "wsd")
    chosen = wsd(warmup=0.0, final=0.0, decay=0.4)
    scales = [chosen.scale(step, 10) for step in range(10)]
    assert scales == pytest.approx([1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("kind", [Cosine, Linear])
def test_what_falls_falls_from_the_end_of_the_warmup_on(kind: Any) -> None:
    chosen = kind(warmup=0.2, final=0.0)
    scales = [chosen.scale(step, 10) for step in range(10)]
    assert scales[:2] == pytest.approx([0.5, 1.0])
    assert scales[5] == pytest.approx(0.5)  # half of what is left
    assert scales[9] == pytest.approx(0.0)


@pytest.mark.parametrize("choice", get_args(Optimizer))
@pytest.mark.parametrize(
    ("field", "value"),
    [("lr", 0.0), ("lr", float("nan")), ("weight_decay", -1.0), ("beta1", 1.0), ("beta2", -0.1)],
)
def test_bad_optimizer_settings_are_named(choice: Any, field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"{field} = "):
        choice(**{field: value})


@pytest.mark.parametrize("schedule", get_args(Schedule))
def test_bad_schedule_settings_are_named(schedule: Any) -> None:
    with pytest.raises(ConfigError, match="warmup = 1"):
        schedule(warmup=1.0)
    with pytest.raises(ConfigError, match="final = "):
        schedule(final=1.5)
