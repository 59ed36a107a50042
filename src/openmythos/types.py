"""Names for the tensors that cross a public signature, each with its shape.

An alias is a plain ``Tensor`` to mypy and costs nothing at run time. ``make test-shapes`` checks
dtype, rank and sizes: within one call, dimensions of the same name must have the same size, so
lengths that may differ have different names.
The checker cannot look inside ``torch.compile``; tests that compile run without it.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

# One entry per position of a padded batch.
TokenIds = Int[Tensor, "batch seq"]
Mask = Bool[Tensor, "batch seq"]
PerToken = Float[Tensor, "batch seq"]
LoopsPerToken = Int[Tensor, "batch seq"]
Hidden = Float[Tensor, "batch seq dim"]
Logits = Float[Tensor, "batch seq vocab"]

# One entry per sequence.
LoopCounts = Int[Tensor, "batch"]
NextTokenIds = Int[Tensor, "batch"]
NextLogits = Float[Tensor, "batch vocab"]

# Attention: keys may be longer than queries (KV cache) and have fewer heads (grouped queries).
Queries = Float[Tensor, "batch heads seq head_dim"]
Keys = Float[Tensor, "batch kv_heads kv_seq head_dim"]
Values = Float[Tensor, "batch kv_heads kv_seq value_dim"]
AttentionOutput = Float[Tensor, "batch heads seq value_dim"]
AttentionMask = Bool[Tensor, "#batch 1 #seq kv_seq"]

# What an attention layer stores per token.
KeyValues = Float[Tensor, "batch kv_seq kv_width"]

# Positions of all sequences flattened to one dimension, as experts get them.
Tokens = Float[Tensor, "tokens dim"]

Scalar = Float[Tensor, ""]
