"""Cross-entropy of a linear readout without the logits of all tokens in memory.

The gradient is computed in the forward pass, chunk by chunk, so that only one chunk of logits is in
memory. `torch.nn.functional.linear_cross_entropy` has the same idea; on the CPU it took longer than
full logits in bf16 and with large vocabularies, see docs/performance.md.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from openmythos import kernels
from openmythos.kernels.precision import as_autocast, at_least_fp32, no_autocast
from openmythos.types import Hidden, Scalar, TokenIds

IGNORE = -100


def reference(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The formula, on hidden [tokens, dim] and targets [tokens]."""
    logits = at_least_fp32(F.linear(hidden, weight))
    return F.cross_entropy(logits, targets, ignore_index=IGNORE)


def linear_cross_entropy(hidden: Hidden, weight: Tensor, targets: TokenIds) -> Scalar:
    """Mean of -log softmax(W h)[target] in nats, over the targets that are not IGNORE.

    weight [vocab, dim]. Under autocast the products run in its dtype, softmax and sums in fp32 at
    least. nan where no target counts.
    """
    flat, targets = as_autocast(hidden).flatten(0, -2), targets.flatten()
    weight, tuned = as_autocast(weight), kernels.fast(hidden.device)
    if tuned is None:
        return reference(flat, weight, targets)
    loss: Tensor = _LinearCrossEntropy.apply(flat, weight, targets, tuned.chunk_tokens)  # type: ignore[no-untyped-call]
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """With z = W h and p = softmax(z):  dL/dz = (p - onehot(target)) / count."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):  # type: ignore[no-untyped-def]
        counted = targets != IGNORE
        wide = torch.promote_types(hidden.dtype, torch.float32)
        share = counted.to(wide) / counted.sum()
        targets = torch.where(counted, targets, 0)[:, None]
        loss = hidden.new_zeros((), dtype=wide)
        with_grad = any(ctx.needs_input_grad)
        grad_hidden = torch.empty_like(hidden) if with_grad else None
        grad_weight = torch.zeros_like(weight, dtype=wide) if with_grad else None
        with no_autocast(hidden):
            for start in range(0, len(hidden), chunk):
                rows = slice(start, start + chunk)
                scores = F.linear(hidden[rows], weight).to(wide)
                highest = scores.amax(dim=-1, keepdim=True)
                target_scores = scores.gather(1, targets[rows])
                # In place from here on: this matrix is most of a chunk's memory traffic.
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
        grad_hidden = grad_hidden * grad.to(grad_hidden.dtype)
        return grad_hidden, (grad_weight * grad).to(ctx.dtype), None, None
