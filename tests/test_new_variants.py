"""The promise of CONTRIBUTING: a new variant is one class and one registration.

Every union gets a variant that exists in this file alone. Together they make a run that is written
to files and read back, trained, resumed, decoded with a cache, planned and exported.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmythos import OpenMythos, config
from openmythos.config import apply_overrides, from_dict, register, to_dict
from openmythos.data.tokenizer import Bytes
from openmythos.inference.generation import Request, stream
from openmythos.model.config import MythosConfig
from openmythos.nn.attention import AttentionLayer
from openmythos.nn.block import Attention, FeedForward
from openmythos.nn.cache import CachePolicy
from openmythos.nn.facts import Fill, constant
from openmythos.nn.feed_forward import FeedForwardLayer
from openmythos.nn.layout import AttentionContext
from openmythos.nn.linear import Deltas, Linear, LowRank
from openmythos.nn.rope_scaling import NoScaling
from openmythos.nn.view import LayerView
from openmythos.planning.cost import plan
from openmythos.recurrence.exit_rules import ExitRule, LoopView
from openmythos.recurrence.halting import Halting, HaltingLayer
from openmythos.recurrence.initial_state import StateInit
from openmythos.recurrence.injection import Drive, InjectionLayer
from openmythos.recurrence.injections import Injection
from openmythos.recurrence.loop_embedding import LoopEmbeddings
from openmythos.recurrence.loop_lora import LoopLoRAs
from openmythos.recurrence.loop_sampling import LoopSampling
from openmythos.train.config import RunConfig, TextData, TrainConfig
from openmythos.train.loss import FinalLoss, Loss
from openmythos.train.optim import Optimizer, Optimizers, Schedule
from openmythos.train.run import Run, train


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Attention that weighs all visible tokens alike."""

    kind: Literal["mean"] = "mean"
    width: int = 8
    rope_base: ClassVar[float] = 1.0
    rope_scaling: ClassVar[NoScaling] = NoScaling()
    window: ClassVar[int] = 0

    def check(self, dim: int) -> None:
        pass

    def rotary_dim(self, dim: int) -> int:
        return 0

    def kv_width(self, dim: int) -> int:
        return self.width

    def multiply_adds_per_key(self, dim: int) -> int:
        return self.width

    def kept_numbers(self, dim: int) -> int:
        return 2 * self.width

    def build(self, dim: int, norm_eps: float) -> "MeanLayer":
        return MeanLayer(self, dim)


class MeanLayer(AttentionLayer):
    def __init__(self, config: Mean, dim: int) -> None:
        super().__init__()
        self.kv_width = config.width
        self.value = Linear(dim, config.width, bias=False)
        self.output = Linear(config.width, dim, bias=False)

    def project_kv(self, x: Tensor, context: AttentionContext, deltas: Deltas = {}) -> Tensor:  # noqa: B006
        return self.value(x, deltas)

    def forward(
        self,
        x: Tensor,
        kv: Tensor,
        context: AttentionContext,
        deltas: Deltas = {},  # noqa: B006
    ) -> Tensor:
        value = kv.to(x.dtype)[:, None]
        query = value.new_zeros(len(x), 1, x.shape[1], self.kv_width)
        return self.output(context.attend(query, value, value, 1.0)[:, 0], deltas)


@dataclass(frozen=True, kw_only=True)
class Tanh:
    kind: Literal["tanh"] = "tanh"
    hidden_dim: int = 24

    def kept_numbers(self, dim: int, *, cast: bool) -> tuple[int, int]:
        return self.hidden_dim, 0

    def build(self, dim: int) -> "TanhLayer":
        return TanhLayer(dim, self.hidden_dim)


class TanhLayer(FeedForwardLayer):
    residual_outputs = ("down.weight",)

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.up, self.down = (
            Linear(dim, hidden_dim, bias=False),
            Linear(hidden_dim, dim, bias=False),
        )

    def forward(self, x: Tensor, view: LayerView) -> tuple[Tensor, None]:
        return self.down(torch.tanh(self.up(x, view.deltas)), view.deltas), None


@dataclass(frozen=True, kw_only=True)
class Convex:
    """u = (1 - a) h + a e."""

    kind: Literal["convex"] = "convex"
    needs_encoded_state: ClassVar[bool] = False
    first: float = 0.5

    def build(self, dim: int) -> "ConvexInjection":
        return ConvexInjection(dim, self.first)


class ConvexInjection(InjectionLayer):
    def __init__(self, dim: int, first: float) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(dim))
        self._first = first

    def fills(self) -> dict[str, Fill]:
        return {"gate": constant(torch.tensor(self._first).logit().item())}

    def prepare(self, encoded: Tensor) -> Drive:
        share = self.gate.sigmoid().to(encoded.dtype)
        return Drive(share * encoded, 1 - share)

    def forward(self, state: Tensor, drive: Drive) -> Tensor:
        return drive.decay * state + drive.input_term

    def max_decay(self) -> Tensor:
        return (1 - self.gate.sigmoid()).max()


@dataclass(frozen=True, kw_only=True)
class Alternating:
    """Every second position halts after two loops."""

    kind: Literal["alternating"] = "alternating"

    def build(self, dim: int) -> "AlternatingHalting":
        return AlternatingHalting()


class AlternatingHalting(HaltingLayer):
    def __init__(self) -> None:
        super().__init__()
        self.price = nn.Parameter(torch.empty(1))

    def fills(self) -> dict[str, Fill]:
        return {"price": constant(1.0)}

    def start(self, state: Tensor) -> dict[str, Tensor]:
        """By the first feature of the state, so that it is a function of the position's own."""
        return {"loops": state.new_zeros(state.shape[:2])}

    def update(
        self, halt: Any, active: Tensor, state: Tensor, loop: Any
    ) -> tuple[dict[str, Tensor], Tensor]:
        loops = halt["loops"] + active
        return {"loops": loops}, active & ~((loops >= 2) & (state[..., 0] > 0))

    def finish(self, halt: Any, state: Tensor, loops_used: Tensor) -> tuple[Tensor, Tensor]:
        return state, self.price * halt["loops"]

    def cumulative(self, halt: Any) -> Tensor:
        return torch.zeros_like(halt["loops"])

    def loss(self, ponder_cost: Tensor) -> Tensor:
        return 1e-3 * ponder_cost


@dataclass(frozen=True, kw_only=True)
class AfterTwo:
    kind: Literal["after_two"] = "after_two"
    needs_logits: ClassVar[bool] = False
    min_loops: ClassVar[int] = 2
    patience: ClassVar[int] = 1
    scope: ClassVar[str] = "token"

    def converged(self, view: LoopView) -> Tensor:
        return torch.ones(view.state.shape[:2], dtype=torch.bool)


@dataclass(frozen=True, kw_only=True)
class ConstantState:
    kind: Literal["constant"] = "constant"
    value: float = 0.1

    def draw(self, encoded: Tensor, positions: Tensor, *, fresh: bool) -> Tensor:
        return torch.full_like(encoded, self.value)


@dataclass(frozen=True, kw_only=True)
class Waves:
    kind: Literal["waves"] = "waves"

    def build(self, dim: int) -> "WavesLayer":
        return WavesLayer(dim)


class WavesLayer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.size = nn.Parameter(torch.empty(dim))

    def fills(self) -> dict[str, Fill]:
        return {"size": constant(0.1)}

    def forward(self, loop: int) -> Tensor:
        return self.size * torch.sin(torch.arange(len(self.size)) + loop)


@dataclass(frozen=True, kw_only=True)
class Fading:
    """One low-rank change of the attention's output, which fades from loop to loop."""

    kind: Literal["fading"] = "fading"

    def build(self, layers: nn.ModuleList) -> "FadingLayer":
        return FadingLayer(layers)


class FadingLayer(nn.Module):
    def __init__(self, layers: nn.ModuleList) -> None:
        super().__init__()
        linear = layers[0].attention.output
        linear.delta_key = "fading"
        self.down = nn.Parameter(torch.empty(1, linear.in_features))
        self.up = nn.Parameter(torch.empty(linear.out_features, 1))

    def multiply_adds(self) -> int:
        return self.down.numel() + self.up.numel()

    def forward(self, loop: int) -> Deltas:
        return {"fading": LowRank(self.down, self.up * 0.5**loop)}


@dataclass(frozen=True, kw_only=True)
class TwoOrThree:
    kind: Literal["two_or_three"] = "two_or_three"
    per: ClassVar[str] = "sequence"
    mean_loops: ClassVar[float] = 2.5
    min_loops: ClassVar[int] = 2
    max_loops: ClassVar[int] = 3

    def draw(self, size: int, mean: float, generator: torch.Generator) -> Tensor:
        return torch.randint(2, 4, (size,), generator=generator).float()


@dataclass(frozen=True, kw_only=True)
class OneSlot:
    """All loops share a slot that each overwrites."""

    kind: Literal["one_slot"] = "one_slot"
    overwrites: ClassVar[bool] = True

    def slot(self, loop: int) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Descent:
    kind: Literal["descent"] = "descent"
    lr: float = 0.1

    def build(self, model: nn.Module, dtype: torch.dtype | None = None) -> Optimizers:
        sgd = torch.optim.SGD(model.parameters(), lr=self.lr, weight_decay=0)
        return Optimizers([sgd], model)


@dataclass(frozen=True, kw_only=True)
class Halved:
    kind: Literal["halved"] = "halved"

    def scale(self, step: int, num_steps: int) -> float:
        return 0.5


@dataclass(frozen=True, kw_only=True)
class Doubled(FinalLoss):
    kind: Literal["doubled"] = "doubled"  # type: ignore[assignment]

    def of(self, losses: Any) -> Tensor:
        return 2 * losses.cross_entropy


NEW = {
    Attention: Mean,
    FeedForward: Tanh,
    Injection: Convex,
    Halting: Alternating,
    ExitRule: AfterTwo,
    StateInit: ConstantState,
    LoopEmbeddings: Waves,
    LoopLoRAs: Fading,
    LoopSampling: TwoOrThree,
    CachePolicy: OneSlot,
    Optimizer: Descent,
    Schedule: Halved,
    Loss: Doubled,
}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_REGISTERED", {})
    for union, member in NEW.items():
        register(union, member)


def run_config(text: Path) -> RunConfig:
    feed_forward: Any = Tanh()
    parts: dict[str, Any] = {
        "attention": Mean(),
        "feed_forward": feed_forward,
        "recurrent_feed_forward": feed_forward,
        "injection": Convex(),
        "halting": Alternating(),
        "state_init": ConstantState(),
        "loop_embedding": Waves(),
        "loop_lora": Fading(),
    }
    learned: dict[str, Any] = {
        "loops": TwoOrThree(),
        "optimizer": Descent(),
        "schedule": Halved(),
        "loss": Doubled(),
    }
    return RunConfig(
        model=MythosConfig(dim=16, context=64, num_loops=3, zero_init_outputs=False, **parts),
        tokenizer=Bytes(),
        data=TextData(paths=(str(text),), held_out=0.2),
        train=TrainConfig(num_steps=4, batch_size=2, seq_len=16, save_every=2, **learned),
    )


@pytest.fixture
def trained(tmp_path: Path) -> Iterator[Run]:
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"some text to learn, {number} " * 20)
    run = Run.create(tmp_path / "run", run_config(tmp_path))
    steps = iter(train(run))
    next(steps), next(steps)
    steps.close()  # type: ignore[attr-defined]
    yield Run.open(run.folder)


def test_new_variants_are_written_read_and_named_on_the_command_line(tmp_path: Path) -> None:
    chosen = run_config(tmp_path)
    assert from_dict(RunConfig, to_dict(chosen)) == chosen
    usual = replace(chosen, model=MythosConfig(dim=16, context=64))
    named = apply_overrides(usual, ["model.injection=convex", "model.injection.first=0.3"])
    assert named.model.injection == Convex(first=0.3)


def test_new_variants_train_resume_and_load(trained: Run) -> None:
    metrics = list(train(trained, resume=True))
    assert [m.step for m in metrics] == [2, 3]
    assert all(m.total_loss > 2 * m.loss and m.loss > 0 for m in metrics)
    assert 0.4 < metrics[-1].max_decay < 0.6
    model = trained.load_model()
    fresh = OpenMythos(trained.config.model, seed=0)
    assert not torch.equal(model.recurrent.injection.gate, fresh.recurrent.injection.gate)


def test_new_variants_decode_with_a_cache(trained: Run, tmp_path: Path) -> None:
    list(train(trained, resume=True))
    trained.load_model().save_pretrained(tmp_path / "exported")
    model = OpenMythos.from_pretrained(tmp_path / "exported")
    prompt = torch.randint(0, 256, (2, 7))
    request: dict[str, Any] = {"max_new_tokens": 5, "num_loops": 3}
    tokens = model.generate(prompt, **request)
    whole = torch.cat((prompt, tokens), dim=1)
    logits = model(whole, num_loops=3).logits[:, 6:-1]
    assert torch.equal(logits.argmax(dim=-1), tokens)
    assert len(model(whole, num_loops=3).recurrence.loops_used.unique()) > 1
    rule: Any = AfterTwo()
    steps = list(stream(model, prompt, Request(exit_rule=rule, **request)))
    assert all((step.loops_used <= 2).all() for step in steps)
    policy: Any = OneSlot()
    steps = list(stream(model, prompt, Request(prefill=policy, decode=policy, **request)))
    assert len(steps) == 5


def test_new_variants_are_planned(tmp_path: Path) -> None:
    chosen = run_config(tmp_path).model
    found = plan(chosen, context=32, num_loops=3)
    assert found.parameters.total == sum(p.numel() for p in OpenMythos(chosen).parameters())
    maps = 2 * 16 * 8 + 2 * 16 * 24  # of a layer
    per_key = 5 * 8 * 16  # 5 layers run, half of 32 tokens are seen
    once = 2 * maps + 257 * 16
    assert found.forward_flops == 2 * (once + 3 * (maps + 8 + 16) + per_key)
    assert found.cache_bytes == 5 * 32 * 8 * 2


def test_a_layer_runs_in_training_and_gets_gradients(tmp_path: Path) -> None:
    model = OpenMythos(run_config(tmp_path).model, seed=0).train()
    tokens = torch.randint(0, 256, (3, 9))
    out = model(tokens, num_loops=torch.tensor([3, 1, 2]))
    loss = F.cross_entropy(out.logits.flatten(0, 1), tokens.flatten())
    (loss + model.recurrent.halting.loss(out.recurrence.ponder_cost)).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
