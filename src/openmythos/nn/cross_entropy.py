"""Cross-entropy of a linear readout without the logits of all tokens in memory.

The gradient is computed in the forward pass, chunk by chunk, so that logits exist once and for one
chunk only. `torch.nn.functional.linear_cross_entropy` has the same idea; on the CPU it took longer
than full logits in bf16 and with large vocabularies, see docs/performance.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos import kernels
from openmythos.nn.linear import as_autocast, at_least_fp32, no_autocast
from openmythos.types import Hidden, Scalar, TokenIds

IGNORE = -100


def linear_cross_entropy(hidden: Hidden, weight: Tensor, targets: TokenIds) -> Scalar:
    """Mean of -log softmax(W h)[target] in nats, over the targets that are not IGNORE.

    weight [vocab, dim]. Equal to `F.cross_entropy(F.linear(hidden, weight).float(), targets)`;
    under autocast the matmuls run in its dtype, softmax and sums in fp32 at least.
    """
    hidden, weight = as_autocast(hidden), as_autocast(weight)
    flat, targets = hidden.flatten(0, -2), targets.flatten()
    if kernels.reference():
        logits = at_least_fp32(F.linear(flat, weight))
        return F.cross_entropy(logits, targets, ignore_index=IGNORE)
    loss: Tensor = _LinearCrossEntropy.apply(flat, weight, targets)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """With z = W h and p = softmax(z):  dL/dz = (p - onehot(target)) / count."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):  # type: ignore[no-untyped-def]
        counted = targets != IGNORE
        wide = torch.promote_types(hidden.dtype, torch.float32)
        share = counted.to(wide) / counted.sum()
        targets = torch.where(counted, targets, 0)[:, None]
        loss = hidden.new_zeros((), dtype=wide)
        chunk = kernels.tuned(hidden.device).chunk_tokens
        with_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_grad else None
        with no_autocast(hidden):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                scores = F.linear(hidden[rows], weight).to(wide)
                highest = scores.amax(dim=-1, keepdim=True)
                target_scores = scores.gather(1, targets[rows])
                # From here on in place: this matrix is most of what a chunk reads and writes.
                scores = scores.sub_(highest).exp_()
                total = scores.sum(dim=-1, keepdim=True)
                losses = (total.log() + highest - target_scores)[:, 0]
                # Where nothing counts, share is nan and so is the mean, as in F.cross_entropy.
                loss += (losses * share[rows]).sum()
                if grad_hidden is None or grad_weight is None:
                    continue
                grad = scores.mul_(share[rows, None] / total)
                grad.scatter_add_(1, targets[rows], -share[rows, None])
                grad = grad.to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden[rows])
                if weight.dtype == wide:
                    grad_weight.addmm_(grad.t(), hidden[rows])
                else:
                    grad_weight += grad.t() @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return loss

    @staticmethod
    @kernels.first_order
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad.to(grad_hidden.dtype), (grad_weight * grad).to(ctx.dtype), None
