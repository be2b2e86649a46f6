"""Router losses, as this rank's share: summed over the ranks they are the loss of the batch."""

from __future__ import annotations

from torch import Tensor


def load_balance_loss(
    prob_TE: Tensor,
    freq_E: Tensor,
    *,
    freq_tokens: int | Tensor,
    num_tokens: int | Tensor,
    top_k: int,
) -> Tensor:
    """E * sum_e (f_e / (T' K)) * (sum over local tokens of p_te) / T, fp32 scalar.

    ``freq_E``: top-k pairs per expert of ``freq_tokens`` (T') tokens, which carry no gradient;
    ``num_tokens`` (T): tokens of all ranks. The loss is linear in the probabilities, so local sums
    need no reduction: with T' = T the shares add up to the Switch loss (arXiv 2101.03961) over the
    batch of all ranks, with T' of a part of the tokens to the mean over such parts.

    ``freq_E`` may be [B, E], for B equal runs of the local tokens: each is a part by itself.
    """
    num_tokens_here, num_experts = prob_TE.shape
    share_BE = freq_E.view(-1, num_experts).float() / (freq_tokens * top_k)
    num_runs = len(share_BE)
    prob_BE = prob_TE.view(num_runs, num_tokens_here // max(num_runs, 1), num_experts).sum(1)
    loss: Tensor = num_experts * (share_BE * prob_BE).sum() / num_tokens
    return loss


def z_loss(logits_TE: Tensor, *, num_tokens: int | Tensor) -> Tensor:
    """This rank's share of the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906)."""
    return logits_TE.float().logsumexp(1).square().sum() / num_tokens
