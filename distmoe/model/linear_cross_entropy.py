"""The output projection and its cross entropy in one, by chunks of tokens.

loss = sum over t of logsumexp(z_t) - z_t[label_t], z_TV = x_TH W_VH^T; dz = softmax(z) - onehot.

Logits are the largest tensor of a step: 4 bytes x 8,192 tokens x 152,000 words are 5 GB. Of a sum
of losses nothing but a factor comes back, so the forward makes the gradients while a chunk's logits
are there, and the backward multiplies them: no logits are kept, and none are made twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# Labels with this value carry no loss, as in torch.nn.functional.cross_entropy.
IGNORE = -100

ChunkLoss = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_cross_entropy(x_CH: Tensor, weight_VH: Tensor, label_C: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the cross entropies, fp32, and the gradient of the logits [C, V] in the dtype of x.

    Call it without autograd.
    """
    is_valid_C1 = label_C[:, None] != IGNORE
    label_C1 = label_C[:, None].where(is_valid_C1, 0)
    logits_CV = F.linear(x_CH, weight_VH)
    prob_CV = logits_CV - logits_CV.amax(1, keepdim=True).float()
    # What follows is in place.
    del logits_CV
    own_C1 = prob_CV.gather(1, label_C1)
    sum_C1 = prob_CV.exp_().sum(1, keepdim=True)
    loss_C1 = sum_C1.log() - own_C1
    # The probabilities are still to be divided by the sum.
    prob_CV.scatter_add_(1, label_C1, -sum_C1)
    dlogits_CV = _product(prob_CV, is_valid_C1 / sum_C1, x_CH.dtype)
    return loss_C1.where(is_valid_C1, 0).sum(), dlogits_CV


class LinearCrossEntropy(torch.autograd.Function):
    """Gradients are rounded to the dtype of x once a chunk's products are summed in fp32, and once
    more when they are multiplied, in fp32, by what comes back."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_VH: Tensor,
        label_T: Tensor,
        chunk_tokens: int,
        chunk_loss: ChunkLoss,
    ) -> Tensor:
        x_TH, weight_VH = x_TH.detach(), weight_VH.detach()
        dx_TH, dweight_VH = torch.empty_like(x_TH), None
        losses = []
        chunks = zip(*(torch.split(t, chunk_tokens) for t in (x_TH, label_T, dx_TH)), strict=True)
        for x_CH, label_C, dx_CH in chunks:
            loss, dlogits_CV = chunk_loss(x_CH, weight_VH, label_C)
            losses.append(loss)
            torch.mm(dlogits_CV, weight_VH, out=dx_CH)
            if dweight_VH is None and len(x_CH) < len(x_TH):
                # Sums in bf16 would lose bits with every chunk.
                dweight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
            dweight_VH = _plus_product(dweight_VH, dlogits_CV.T, x_CH)
            # Before the next chunk makes its own.
            del dlogits_CV
        ctx.gradients = (dx_TH, dweight_VH)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("linear_cross_entropy goes backward once; its gradients are gone")
        (dx_TH, dweight_VH), ctx.gradients = ctx.gradients, None
        # With a dim, or it would be rounded to bf16 before it multiplies.
        factor_1, dtype = dloss[None], dx_TH.dtype
        dx_TH, dweight_VH = (_product(t, factor_1, dtype) for t in (dx_TH, dweight_VH))
        return dx_TH, dweight_VH, None, None, None


def _plus_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    if total is None:
        return a @ b
    return total.addmm_(a, b) if total.dtype == a.dtype else total.add_(a @ b)


def _product(t: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """In fp32, rounded to ``dtype`` as it is written; in place of ``t`` if that has the dtype."""
    out = t if t.dtype == dtype else torch.empty_like(t, dtype=dtype)
    return torch.mul(t, factor, out=out)


def linear_cross_entropy(
    x_TH: Tensor,
    weight_VH: Tensor,
    label_T: Tensor,
    *,
    chunk_tokens: int,
    chunk_loss: ChunkLoss = chunk_cross_entropy,
) -> Tensor:
    """Sum over the tokens whose label is not IGNORE, in nats, fp32; backward once.

    ``chunk_tokens``: how many tokens' logits exist at one time. ``chunk_loss``: of one chunk.
    """
    if torch.is_grad_enabled():
        loss: Tensor = LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            x_TH, weight_VH, label_T, chunk_tokens, chunk_loss
        )
        return loss
    chunks = zip(*(torch.split(t, chunk_tokens) for t in (x_TH, label_T)), strict=True)
    return torch.stack([chunk_loss(x, weight_VH, label)[0] for x, label in chunks]).sum()
