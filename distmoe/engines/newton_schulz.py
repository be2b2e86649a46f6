"""Newton-Schulz iteration: from a matrix U S V^T to nearly U V^T, with nothing but products.

A step takes X to a X + b (X X^T) X + c (X X^T)^2 X, which takes every singular value s to
a s + b s^3 + c s^5. The coefficients are Keller Jordan's (kellerjordan.github.io/posts/muon): steep
at 0, so that five steps take every value from 0.01 to 1 to between 0.68 and 1.14, instead of to 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
STEPS = 5
# Of the norm that a matrix is divided by: no update out of nothing.
EPS = 1e-7
# Elements that are orthogonalised at one time: it takes a few copies of them.
BATCH_ELEMENTS = 1 << 26


def orthogonalize_(x_BMN: Tensor) -> Tensor:
    """Every matrix of a batch in place, in the dtype that it has; a matrix of zeros stays zero."""
    matrices = max(1, BATCH_ELEMENTS // x_BMN[0].numel())
    for part_BMN in torch.split(x_BMN, matrices):
        part_BMN.copy_(_iterate(part_BMN))
    return x_BMN


def _iterate(x_BMN: Tensor) -> Tensor:
    is_tall = x_BMN.shape[-2] > x_BMN.shape[-1]
    # The products of the shorter side are the smaller ones.
    x = x_BMN.mT if is_tall else x_BMN
    norm = torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = x / norm.clamp(min=EPS).to(x.dtype)
    for _ in range(STEPS):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.baddbmm(x, gram, x, beta=A)
    return x.mT if is_tall else x
