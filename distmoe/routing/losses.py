"""Router losses, as this rank's share: summed over the ranks they are the loss of the batch."""

from __future__ import annotations

from torch import Tensor


def load_balance_loss(
    prob_TE: Tensor,
    freq_E: Tensor,
    *,
    freq_tokens: int | Tensor,
    num_tokens: float | Tensor,
    top_k: int,
) -> Tensor:
    """E * sum_e (f_e / (T' K)) * (sum over local tokens of p_te) / T, fp32 scalar.

    ``freq_E``: top-k pairs per expert of ``freq_tokens`` (T') tokens, which carry no gradient;
    ``num_tokens`` (T): tokens of all ranks. The loss is linear in the probabilities, so local sums
    need no reduction: with T' = T the shares add up to the Switch loss (arXiv 2101.03961) over the
    batch of all ranks, with T' of a part of the tokens to the mean over such parts.

    ``freq_E`` may be [B, E], for B equal runs of the local tokens: each is a part by itself.
    Without any token the loss is 0.
    """
    num_tokens_here, num_experts = prob_TE.shape
    share_BE = freq_E.view(-1, num_experts).float() / (_at_least_one(freq_tokens) * top_k)
    num_runs = len(share_BE)
    prob_BE = prob_TE.view(num_runs, num_tokens_here // max(num_runs, 1), num_experts).sum(1)
    loss: Tensor = num_experts * (share_BE * prob_BE).sum() / _at_least_one(num_tokens)
    return loss


def z_loss(logits_TE: Tensor, *, num_tokens: float | Tensor) -> Tensor:
    """This rank's share of the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906); 0
    without any token."""
    return logits_TE.float().logsumexp(1).square().sum() / _at_least_one(num_tokens)


def _at_least_one(tokens: float | Tensor) -> float | Tensor:
    """A divisor: sums over no tokens are 0, not 0 / 0."""
    return tokens.clamp(min=1) if isinstance(tokens, Tensor) else max(tokens, 1)
