"""The config of a whole model; every swappable mechanism is a union defined where it is built."""

from dataclasses import dataclass, field

from openmythos.config import MAX_WIDTH, require, require_int, require_number
from openmythos.nn.block import Attention, FeedForward
from openmythos.nn.feed_forward import SwiGLU
from openmythos.nn.latent_attention import LatentAttention
from openmythos.nn.moe import MoE
from openmythos.recurrence.halting import Halting, NoHalting
from openmythos.recurrence.injection import LTI, Injection
from openmythos.recurrence.loop_embedding import LoopEmbeddings, NoLoopEmbedding
from openmythos.recurrence.loop_lora import LoopLoRA, LoopLoRAs
from openmythos.recurrence.loop_sampling import MOST_LOOPS
from openmythos.recurrence.recurrent_block import StateInit

# Beyond any model; larger numbers would overflow what is computed of them, or take minutes.
MAX_SIZE = 2**31 - 1
MAX_LAYERS = 1024


@dataclass(frozen=True, kw_only=True)
class MythosConfig:
    """Prelude (run once) -> recurrent block (num_loops times) -> coda (run once).

    `num_loops` is the default number of loops at inference; any other can be asked for at every
    call. `feed_forward` is used in prelude and coda, `recurrent_feed_forward` inside the loop.
    `zero_init_outputs` starts every residual branch at zero.
    """

    vocab_size: int = 257
    dim: int = 256
    context: int = 1024
    prelude_layers: int = 1
    recurrent_layers: int = 1
    coda_layers: int = 1
    num_loops: int = 4
    attention: Attention = field(default_factory=LatentAttention)
    feed_forward: FeedForward = field(default_factory=SwiGLU)
    recurrent_feed_forward: FeedForward = field(default_factory=MoE)
    injection: Injection = field(default_factory=LTI)
    halting: Halting = field(default_factory=NoHalting)
    loop_embedding: LoopEmbeddings = field(default_factory=NoLoopEmbedding)
    loop_lora: LoopLoRAs = field(default_factory=LoopLoRA)
    state_init: StateInit = "zeros"
    prelude_norm: bool = True
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
        require(
            self.state_init in ("zeros", "encoded", "normal"),
            "state_init",
            self.state_init,
            'must be "zeros", "encoded" or "normal"',
        )
        self.attention.check(self.dim)
        self.injection.check(self.state_init)

    def effective_depth(self, num_loops: int) -> int:
        """Layers executed per token."""
        return self.prelude_layers + num_loops * self.recurrent_layers + self.coda_layers
