"""The model config; every swappable part is a union, defined in the file of its module."""

from dataclasses import dataclass, field
from typing import Literal, get_args

from openmythos.config import MAX_WIDTH, require, require_int, require_number
from openmythos.nn.block import Attention, FeedForward, NormPlace
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE
from openmythos.nn.value_embedding import NoValueEmbeddings, ValueEmbeddings
from openmythos.recurrence.halting import Halting, NoHalting
from openmythos.recurrence.initial_state import EncodedState, StateInit, ZeroState
from openmythos.recurrence.injection import LTI
from openmythos.recurrence.injections import Injection
from openmythos.recurrence.loop_embedding import LoopEmbeddings, NoLoopEmbedding
from openmythos.recurrence.loop_lora import LoopLoRA, LoopLoRAs
from openmythos.recurrence.loop_sampling import MOST_LOOPS

# Above any real model: larger sizes would overflow, or take minutes to build.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1024

NormKind = Literal["none", "weighted", "plain"]


@dataclass(frozen=True, kw_only=True)
class MythosConfig:
    """Prelude (run once) -> recurrent block (num_loops times) -> coda (run once).

    `num_loops` is the default number of loops at inference; any other can be asked for at every
    call. `feed_forward` is used in prelude and coda, `recurrent_feed_forward` inside the loop.
    `zero_init_outputs` starts every residual branch at zero.

    Norms, besides that of each block (`block_norms`, see `nn.block.Block`): `prelude_norm` on what
    enters the loops, `loop_norm` on the state after every loop ("plain": without weight),
    `readout_norm` once after the last loop, `final_norm` before the head. `readout_map`: a linear
    map of the state after the last loop, before the coda. Embeddings are multiplied by
    `embed_scale`; logits by `logit_scale`, then softcapped: cap * tanh(logits / cap), 0: off.
    """

    vocab_size: int = 257
    dim: int = 256
    context: int = 1024
    prelude_layers: int = 1
    recurrent_layers: int = 1
    coda_layers: int = 1
    num_loops: int = 4
    attention: Attention = field(default_factory=LatentAttention)
    value_embeddings: ValueEmbeddings = field(default_factory=NoValueEmbeddings)
    feed_forward: FeedForward = field(default_factory=SwiGLU)
    recurrent_feed_forward: FeedForward = field(default_factory=MoE)
    injection: Injection = field(default_factory=LTI)
    halting: Halting = field(default_factory=NoHalting)
    loop_embedding: LoopEmbeddings = field(default_factory=NoLoopEmbedding)
    loop_lora: LoopLoRAs = field(default_factory=LoopLoRA)
    state_init: StateInit = field(default_factory=ZeroState)
    prelude_norm: bool = True
    block_norms: tuple[NormPlace, ...] = ("input",)
    loop_norm: NormKind = "none"
    readout_norm: bool = False
    readout_map: bool = False
    final_norm: bool = True
    embed_scale: float = 1.0
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    tie_embeddings: bool = True
    zero_init_outputs: bool = True
    norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context"):
            require_int(name, getattr(self, name), minimum=1, maximum=MAX_SIZE)
        require_int("dim", self.dim, minimum=1, maximum=MAX_WIDTH)
        require_int("num_loops", self.num_loops, minimum=1, maximum=MOST_LOOPS)
        require_int("recurrent_layers", self.recurrent_layers, minimum=1, maximum=MAX_LAYERS)
        for name in ("prelude_layers", "coda_layers"):
            require_int(name, getattr(self, name), minimum=0, maximum=MAX_LAYERS)
        require_number("norm_eps", self.norm_eps, above=0, at_most=1)
        for name in ("embed_scale", "logit_scale"):
            require_number(name, getattr(self, name), above=0, at_most=1e6)
        require_number("logit_softcap", self.logit_softcap, at_least=0, at_most=1e6)
        places = get_args(NormPlace)
        fits = 0 < len(set(self.block_norms)) == len(self.block_norms)
        fits = fits and set(self.block_norms) <= set(places)
        known = ", ".join(places)
        require(
            fits, "block_norms", self.block_norms, f"must hold one or more of {known}, each once"
        )
        self.attention.check(self.dim)
        self.value_embeddings.check(self.dim, self.attention)
        require(
            not self.injection.needs_encoded_state or isinstance(self.state_init, EncodedState),
            "state_init",
            self.state_init.kind,
            f'must be "encoded" with injection "{self.injection.kind}", or the input would '
            "never be seen",
        )

    def effective_depth(self, num_loops: int) -> int:
        """Layers executed per token."""
        return self.prelude_layers + num_loops * self.recurrent_layers + self.coda_layers
