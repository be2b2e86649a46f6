"""Training written out in plain PyTorch: what every engine has to give.

Of the package it takes modules' own forwards (attention, norms, dense MLPs), the loop over experts
and the loops of rounding. Router, losses, objective, clipping, decay and update are written here
again, and share no code with what trains.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from distmoe.config import Config
from distmoe.data.batches import Batch
from distmoe.kernels.moe_mlp.reference import moe_mlp
from distmoe.model.rope import rope_tables
from distmoe.model.transformer import Transformer
from distmoe.moe.layer import MoE
from distmoe.routing.rounding.reference import round_all_tokens

# The first two steps are not clipped. Epsilon is as large as gradients, or else Adam would divide a
# wrong scale of them out again.
STEPS = 3
OPTIM = {"optim.lr": 1e-2, "optim.eps": 1e-3, "optim.clip_norm": 0.86}


def train_by_hand(
    config: Config, initial: dict[str, np.ndarray], steps: list[list[Batch]]
) -> dict[str, Any]:
    """Trains from the weights ``initial`` as `test_parity.train` does. A step's batches hold the
    tokens of all ranks; the tokens of one batch are rounded together."""
    model = Transformer(config)
    named = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(torch.from_numpy(initial[name]))
    optimizer = _adamw(named, config)
    losses, norms, gradients = [], [], {}
    for batches in steps:
        optimizer.zero_grad()
        losses.append(_backward(model, config, batches))
        gradients = gradients or {name: p.grad.numpy().copy() for name, p in named.items()}
        norms.append(float(clip_grad_norm_(named.values(), config.optim.clip_norm)))
        optimizer.step()
    final = {name: parameter.detach().numpy() for name, parameter in named.items()}
    return {
        "initial": initial,
        "losses": np.array(losses),
        "norms": np.array(norms),
        "gradients": gradients,
        "final": final,
    }


def _adamw(named: dict[str, Tensor], config: Config) -> torch.optim.AdamW:
    """Matrices decay, but for the embedding."""
    optim = config.optim
    decays = {name: p.dim() > 1 and p is not named["embedding.weight"] for name, p in named.items()}
    groups = [
        {
            "params": [p for name, p in named.items() if decays[name] == decay],
            "weight_decay": optim.weight_decay * decay,
        }
        for decay in (True, False)
    ]
    return torch.optim.AdamW(
        groups, lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, foreach=False
    )


def _backward(model: Transformer, config: Config, batches: list[Batch]) -> list[float]:
    """Token, load-balance and z-loss of a step, means over tokens and layers."""
    moe, sums = config.moe, torch.zeros(3)
    num_tokens = sum(batch.labels_BS.numel() for batch in batches)
    for batch in batches:
        token_loss, balances, zs = _forward(model, config, batch)
        token_loss = token_loss / num_tokens
        balance, z = sum(balances) / len(batches), sum(zs) / len(batches)
        (token_loss + moe.load_balance_coef * balance + moe.z_loss_coef * z).backward()
        sums += torch.stack([token_loss, balance / len(balances), z / len(zs)]).detach()
    return sums.tolist()


def _forward(
    model: Transformer, config: Config, batch: Batch
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Cross entropies summed over tokens, and every layer's load-balance and z-loss."""
    tokens_BS, labels_BS = batch.tokens_BS, batch.labels_BS
    sizes = config.model
    x_BSH = F.embedding(tokens_BS, model.embedding.weight)
    tables = rope_tables(
        tokens_BS.shape[1], sizes.head_dim, theta=sizes.rope_theta, device=x_BSH.device
    )
    balances, zs = [], []
    for block in model.blocks:
        x_BSH = x_BSH + block.attention(block.attention_norm(x_BSH), *tables, None)
        normed_BSH = block.mlp_norm(x_BSH)
        if isinstance(block.mlp, MoE):
            out_TH, balance, z = _moe(block.mlp, config, normed_BSH.flatten(0, 1))
            x_BSH = x_BSH + out_TH.view_as(x_BSH)
            balances.append(balance)
            zs.append(z)
        else:
            x_BSH = x_BSH + block.mlp(normed_BSH)
    head = model.embedding if sizes.tie_embeddings else model.head
    logits_TV = F.linear(model.final_norm(x_BSH), head.weight).flatten(0, 1)
    log_prob_T1 = logits_TV.log_softmax(1).gather(1, labels_BS.reshape(-1, 1))
    return -log_prob_T1.sum(), balances, zs


def _moe(layer: MoE, config: Config, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, load-balance loss and z-loss of softmax over all experts, then top-k."""
    moe, rounding = config.moe, config.moe.rounding
    logits_TE = x_TH @ layer.router_EH.T
    prob_TE = logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)
    chosen_TE, selected_TE = round_all_tokens(
        prob_TE.detach(),
        moe.top_k,
        tile=rounding.tile,
        rule=rounding.rule,
        groups=rounding.balance_groups,
    )
    weight_TE = prob_TE / (prob_TE * chosen_TE).sum(1, keepdim=True)
    token_L, expert_L = selected_TE.nonzero(as_tuple=True)
    out_TH = moe_mlp(
        x_TH,
        layer.experts.w_in_eGH,
        layer.experts.w_out_eHI,
        row_L=token_L,
        expert_L=expert_L,
        score_L=weight_TE[token_L, expert_L],
        activation=moe.activation,
    )
    if layer.shared is not None:
        out_TH = out_TH + layer.shared(x_TH)
    share_E = chosen_TE.sum(0) / chosen_TE.sum()
    balance = moe.num_experts * (share_E * prob_TE.mean(0)).sum()
    return out_TH, balance, logits_TE.logsumexp(1).square().mean()
