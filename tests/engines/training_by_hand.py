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

from distmoe.config import Config, RoundingConfig
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
# Forced choices: of two experts that are nearly equal, bf16 may choose the other one.
BF16: dict[str, Any] = {
    "settings": OPTIM | {"train.dtype": "bf16"},
    "moe": {"router": "balanced", "rounding": RoundingConfig("none")},
}


def train_by_hand(
    config: Config, initial: dict[str, np.ndarray], steps: list[list[Batch]]
) -> dict[str, Any]:
    """Trains from the weights ``initial`` as `parity_runs.train` does. A step's batches hold the
    tokens of all ranks; the tokens of one batch are rounded together. In bf16 it goes forward and
    backward with rounded copies of fp32 weights."""
    model = Transformer(config).to(
        {"fp32": torch.float32, "bf16": torch.bfloat16}[config.train.dtype]
    )
    master = {name: torch.tensor(initial[name]) for name, _ in model.named_parameters()}
    muon = Muon(master if config.optim.name == "muon" else {}, config)
    optimizer = _adamw({n: w for n, w in master.items() if n not in muon.weights}, config)
    losses, norms, gradients = [], [], {}
    for batches in steps:
        model.load_state_dict(master, strict=False)
        losses.append(_backward(model, config, batches, master))
        gradients = gradients or {name: w.grad.numpy().copy() for name, w in master.items()}
        norms.append(float(clip_grad_norm_(master.values(), config.optim.clip_norm)))
        optimizer.step()
        muon.step()
    final = {name: weight.numpy() for name, weight in master.items()}
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


class Muon:
    """Every matrix by its singular values: the iteration is an odd polynomial, which acts on each
    of them by itself."""

    def __init__(self, master: dict[str, Tensor], config: Config) -> None:
        self.optim = config.optim
        self.gated = config.moe.activation.endswith("glu")
        self.weights = {
            name: weight
            for name, weight in master.items()
            if name.startswith("blocks.") and weight.dim() > 1 and "router" not in name
        }
        self.momentum = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    def matrices(self, name: str, weight: Tensor) -> list[Tensor]:
        """Views: of each expert, of gate and up."""
        two = name.endswith("in_proj.weight") or (self.gated and "w_in" in name)
        halves = weight.chunk(2 if two else 1, dim=-2)
        return [m for half in halves for m in (half if half.dim() == 3 else [half])]

    @torch.no_grad()
    def step(self) -> None:
        optim = self.optim
        for name, weight in self.weights.items():
            momentum = optim.momentum * self.momentum[name] + weight.grad
            update = weight.grad + optim.momentum * momentum
            self.momentum[name] = momentum
            pairs = zip(self.matrices(name, weight), self.matrices(name, update), strict=True)
            for own, matrix in pairs:
                u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
                s = s / max(float(s.norm()), 1e-7)
                for _ in range(5):
                    s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
                own *= 1 - optim.lr * optim.weight_decay
                own -= (optim.lr * 0.2 * max(matrix.shape) ** 0.5 * u @ s.diag() @ vt).float()


def _backward(
    model: Transformer, config: Config, batches: list[Batch], master: dict[str, Tensor]
) -> list[float]:
    """Token, load-balance and z-loss of a step, means over tokens and layers. Gradients are added
    up in fp32."""
    moe, sums = config.moe, torch.zeros(3)
    num_tokens = sum(batch.labels_BS.numel() for batch in batches)
    for batch in batches:
        token_loss, balances, zs = _forward(model, config, batch)
        token_loss = token_loss / num_tokens
        balance, z = sum(balances) / len(batches), sum(zs) / len(batches)
        (token_loss + moe.load_balance_coef * balance + moe.z_loss_coef * z).backward()
        for name, parameter in model.named_parameters():
            before = master[name].grad if batch is not batches[0] else 0
            master[name].grad = before + parameter.grad.float()
            parameter.grad = None
        sums += torch.stack([token_loss, balance / len(balances), z / len(zs)]).detach()
    return sums.tolist()


def _forward(
    model: Transformer, config: Config, batch: Batch
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Cross entropies summed over tokens, and every layer's load-balance and z-loss."""
    tokens_BS, labels_BS = batch.tokens_BS, batch.labels_BS
    sizes = config.model
    x_BSH = F.embedding(tokens_BS, model.embedding.weight)
    position_S = torch.arange(tokens_BS.shape[1], device=x_BSH.device)
    tables = rope_tables(position_S, sizes.head_dim, model=sizes)
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
    log_prob_T1 = logits_TV.float().log_softmax(1).gather(1, labels_BS.reshape(-1, 1))
    return -log_prob_T1.sum(), balances, zs


def _moe(layer: MoE, config: Config, x_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Output, load-balance loss and z-loss of softmax over all experts, then top-k, or, with the
    router `balanced`, the experts in turn."""
    moe, rounding = config.moe, config.moe.rounding
    logits_TE = x_TH.float() @ layer.router_EH.float().T
    prob_TE = logits_TE.exp() / logits_TE.exp().sum(1, keepdim=True)
    chosen_TE, selected_TE = round_all_tokens(
        prob_TE.detach(),
        moe.top_k,
        tile=rounding.tile,
        rule=rounding.rule,
        groups=rounding.balance_groups,
    )
    if moe.router == "balanced":
        turn_TE = torch.arange(moe.num_experts) - torch.arange(len(x_TH))[:, None] * moe.top_k
        selected_TE = chosen_TE = turn_TE % moe.num_experts < moe.top_k
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
