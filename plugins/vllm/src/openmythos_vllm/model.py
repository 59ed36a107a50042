"""The model in vLLM: the package's own layers, around attention modules of vLLM."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

from openmythos.hub import export
from openmythos.hub.export_model import native_config
from openmythos.model.mythos import OpenMythos
from openmythos.model.stages import Stages
from openmythos.nn.latent_attention import LatentAttentionLayer
from openmythos.nn.layout import rope_tables
from openmythos.nn.moe import MoELayer
from openmythos.nn.view import KVView, LayerView, NoCache
from openmythos.recurrence.state import LoopInputs, LoopState
from openmythos.types import Hidden
from openmythos_vllm.checks import POLICIES, cache_policy, heads
from openmythos_vllm.experts import fuse
from openmythos_vllm.loops import rows_of
from openmythos_vllm.planes import (
    AbsorbedAttention,
    PlaneContext,
    SharedKeys,
    loops_of_tokens,
    token_counts,
)


class OpenMythosForCausalLM(nn.Module):
    """Token ids of several requests, one after another -> hidden states, logits.

    `num_loops` of the config, which `hf_overrides` sets, is the number of planes that every request
    has, the loops of a request that names none, and the most that one may ask for.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.native = OpenMythos(native_config(config)).eval().requires_grad_(False)
        for module in self.native.modules():
            if type(module) is LatentAttentionLayer:
                module.__class__ = AbsorbedAttention
        self.stages = Stages(self.native)
        self.policy = POLICIES[cache_policy(config)]()
        self.rows = rows_of(vllm_config)
        self.planes = nn.ModuleList(self._planes(vllm_config, prefix))

    def _planes(self, vllm_config: VllmConfig, prefix: str) -> Iterable[Attention]:
        """A plane per layer and loop, in the order they run."""
        c = self.native.config
        (prelude, recurrent, _), head = self.stages.layers, heads(c)
        # What vLLM calls a plane may have one number in it.
        names = [f"{prefix}{'.' if prefix else ''}planes.{i}.attn" for i in range(self._count())]
        for i, name in enumerate(names):
            loop, layer = divmod(i - prelude, recurrent)
            shared = 0 <= loop < c.num_loops and not self._writes(loop)
            yield Attention(
                head.queries,
                head.size,
                head.scale,
                num_kv_heads=head.keys,
                cache_config=vllm_config.cache_config,
                per_layer_sliding_window=c.attention.window or None,
                prefix=name,
                kv_sharing_target_layer_name=names[prelude + layer] if shared else None,
            )

    def _count(self) -> int:
        return self.native.config.effective_depth(self.native.config.num_loops)

    def _writes(self, loop: int) -> bool:
        """Whether a loop keeps keys and values of its own."""
        return self.policy.overwrites or loop == 0

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """[tokens, dim]; vLLM wants the method, `forward` does not use it."""
        return self.native.embed(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
    ) -> Tensor:
        """The head's input [tokens, dim] for input_ids and positions [tokens]."""
        c, (prelude, _, coda) = self.native.config, self.stages.layers
        a, cos, sin = c.attention, None, None
        if width := a.rotary_dim(c.dim):
            cos, sin = rope_tables(positions[None, None], width, a.rope_base, a.rope_scaling)
        context = PlaneContext(
            positions[None],
            cos,
            sin,
            mask=None,
            is_causal=True,
            tokens=input_ids[None],
            planes=iter(self.planes),
            total=len(input_ids),
        )
        views = [LayerView(context)] * prelude
        x, _ = self.native.prelude(self.native.embedded(input_ids[None]), views)
        state, inputs = self.native.recurrent.start(x, context)
        state = self._looped(state, inputs, self._loops(input_ids))
        context = replace(context, planes=iter(self.planes[self._count() - coda :]))
        hidden, _ = self.native.recurrent.readout(state)
        x, _ = self.native.coda(hidden, [LayerView(context)] * coda)
        return self.native.norm(x)[0]

    def _loops(self, input_ids: Tensor) -> int | Tensor:
        """The loops of this pass: one number, or one per token [tokens]."""
        every = self.native.config.num_loops
        metadata = get_forward_context().attn_metadata
        if not self.rows or not isinstance(metadata, dict):  # None: a pass that only warms up
            return every
        first = metadata[self.planes[0].layer_name]
        counts = token_counts(first.query_start_loc, len(input_ids))
        loops = [self.rows.get(row, every) for row in range(len(counts) - 1)]
        if len(set(loops)) == 1:
            return loops[0]
        return loops_of_tokens([*loops, 1], counts, input_ids.device)

    def _looped(self, state: LoopState, inputs: LoopInputs, loops: int | Tensor) -> LoopState:
        """The state after every token's loops. Tokens that are done leave the later ones."""
        if isinstance(loops, int):
            for loop in range(loops):
                state, _ = self.native.recurrent.step(state, inputs, loop, self._views(state, loop))
            return state
        done, columns = state, torch.arange(len(loops), device=loops.device)
        for loop in range(int(loops.max())):
            if loop in loops:
                done, running = _put(done, state, columns), (loops > loop).nonzero()[:, 0]
                state = state.map(lambda x, running=running: x[:, running])
                inputs = inputs.pick(running[None], len(loops))
                columns, loops = columns[running], loops[running]
            state, _ = self.native.recurrent.step(state, inputs, loop, self._views(state, loop))
        return _put(done, state, columns)

    def _views(self, state: LoopState, loop: int) -> list[KVView]:
        layers, x = self.stages.layers[1], state.hidden
        if self._writes(loop):
            return [NoCache()] * layers
        return [SharedKeys(x.new_empty(1, x.shape[1], self.stages.kv_width))] * layers

    def compute_logits(self, hidden: Hidden) -> Tensor:
        """Logits [tokens, vocab_size] of the head's input [tokens, dim]."""
        return self.native.logits(hidden)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the tensors of an export; an error names those that are missing or unknown."""
        own = {name.removeprefix(export.PREFIX): tensor for name, tensor in weights}
        if export.HEAD in own:
            own["head.weight"] = own.pop(export.HEAD)
        self.native.load_state_dict(own)
        for module in self.native.modules():
            if type(module) is MoELayer:
                fuse(module)
        return {f"native.{name}" for name in own}


def _put(whole: LoopState, part: LoopState, columns: Tensor) -> LoopState:
    """The state in which the tokens `columns` are those of `part`."""
    return whole.map(lambda x, new: x.index_copy(1, columns, new), part)
