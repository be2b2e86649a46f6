"""Counts by hand, and against the model itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distmoe.config import Config, MlaConfig, RoundingConfig
from distmoe.engines.single import SingleEngine
from distmoe.metrics.flops import flops_per_token, parameter_counts, peak_flops
from distmoe.model.transformer import Transformer


def test_parts_by_hand(config: Config) -> None:
    counts = parameter_counts(config.model, config.moe)
    assert counts.embedding == counts.head == 50 * 8
    # q and o are 8 x 8, k and v 8 x 4, and two norms of 4.
    assert counts.attention == 3 * (2 * 64 + 2 * 32 + 8)
    assert counts.norms == 7 * 8
    assert counts.dense_mlps == 3 * 8 * 20
    assert counts.routers == 2 * 4 * 8
    assert counts.shared_experts == 2 * 3 * 8 * 10
    assert counts.experts == 2 * 4 * 3 * 8 * 6
    assert counts.active_experts == 2 * 2 * 3 * 8 * 6
    assert counts.total == 800 + 600 + 56 + 480 + 64 + 480 + 1152
    assert counts.active == counts.total - 576


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("qk_norm", ["", "head", "projection"])
@pytest.mark.parametrize("shared", [0, 10])
@pytest.mark.parametrize("n_dense", [0, 1, 3])
def test_total_is_that_of_the_model(
    config: Config,
    tied: bool,
    qk_norm: Literal["", "head", "projection"],
    shared: int,
    n_dense: int,
) -> None:
    model = replace(config.model, tie_embeddings=tied, n_dense_layers=n_dense)
    model = replace(model, qk_norm=bool(qk_norm), qk_norm_scope=qk_norm or "head")
    config = replace(config, model=model, moe=replace(config.moe, shared_intermediate_size=shared))
    with torch.device("meta"):
        built = Transformer(config)
    total = sum(p.numel() for p in built.parameters())
    assert parameter_counts(config.model, config.moe).total == total


MLA = MlaConfig(kv_lora_rank=6, qk_nope_head_dim=2, qk_rope_head_dim=2, v_head_dim=4)


@pytest.mark.parametrize("q_lora_rank", [0, 5])
def test_latent_attention_is_counted(config: Config, q_lora_rank: int) -> None:
    mla = replace(MLA, q_lora_rank=q_lora_rank)
    model = replace(config.model, attention="mla", mla=mla)
    config = replace(config, model=model, moe=replace(config.moe, rounding=RoundingConfig("none")))
    with torch.device("meta"):
        built = Transformer(config)
    counts = parameter_counts(config.model, config.moe)
    assert counts.total == sum(p.numel() for p in built.parameters())
    # Two heads of 4 by 8; latents of 6 and 2 by 8; keys and values of two heads by 6; output.
    queries = 5 * 8 + 8 * 5 + 5 if q_lora_rank else 8 * 8
    assert counts.attention == 3 * (queries + 8 * 8 + 6 + 2 * 6 * 6 + 8 * 8)
    assert_torch_counts_the_same(config, norms=counts.norms + 3 * (q_lora_rank + 6))
    # Values of half the size: half of their products.
    half = replace(config, model=replace(model, mla=replace(mla, v_head_dim=2)))
    fewer = 6 * (counts.total - parameter_counts(half.model, half.moe).total)
    attended = 3 * (3 * 2 * 2 * 16 * 8) // 4
    assert flops_per_token(config).palm - flops_per_token(half).palm == fewer + attended


def test_biases_of_queries_keys_and_values_are_counted(config: Config) -> None:
    biased = replace(config.model, qkv_bias=True)
    plain, more = (parameter_counts(model, config.moe) for model in (config.model, biased))
    assert more.total - plain.total == 3 * (8 + 4 + 4)


def test_flops_by_hand(config: Config) -> None:
    flops = flops_per_token(config)
    # 3056 active parameters, of which the look-up of 400 multiplies nothing.
    matmuls = 6 * (3056 - 400)
    # Scores and values, 2 * 2 * 16 positions * 8 each in the forward, twice that in the backward.
    square = 3 * (3 * 2 * 2 * 16 * 8)
    assert flops.palm == matmuls + square
    assert flops.model == matmuls + square // 2


def test_flops_inside_of_documents_by_hand(config: Config) -> None:
    # Documents of 4 and 12 tokens in a sequence of 16: (16 + 144) / 16.
    flops = flops_per_token(config, document_tokens=10.0)
    whole = flops_per_token(config)
    assert flops.palm == whole.palm
    assert whole.model - flops.model == 3 * (3 * 2 * 2 * (16 - 10) * 8) // 2
    assert flops_per_token(config, document_tokens=16.0) == whole


def test_flops_are_what_torch_counts(config: Config) -> None:
    """Every product of a forward and a backward; the rest of 6 per parameter is the norms', which
    multiply no matrices."""
    config = replace(config, moe=replace(config.moe, rounding=RoundingConfig("none")))
    counts = parameter_counts(config.model, config.moe)
    norms = counts.norms + (2 * 4 * config.model.n_layers if config.model.qk_norm else 0)
    assert_torch_counts_the_same(config, norms=norms)


def assert_torch_counts_the_same(config: Config, *, norms: int) -> None:
    config = replace(config, train=replace(config.train, dtype="fp32"))
    engine = SingleEngine(config, None, torch.device("cpu"))
    tokens_BS = torch.randint(50, (2, config.data.seq_len))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        engine.backward(engine.model(tokens_BS, tokens_BS).token_loss, last=True)
    flops = flops_per_token(config)
    assert counter.get_total_flops() == tokens_BS.numel() * (flops.palm - 6 * norms)


def test_a_tied_embedding_is_still_multiplied_as_the_head(config: Config) -> None:
    tied = replace(config, model=replace(config.model, tie_embeddings=True))
    assert flops_per_token(tied) == flops_per_token(config)


def test_peak_is_known_or_none() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("NVIDIA H100 NVL") == 835e12
    assert peak_flops("NVIDIA H200") == 989e12
    # Names that only contain a known one are other devices.
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None
    assert peak_flops("NVIDIA H200 NVL") is None
    assert peak_flops("H100") is None
    assert peak_flops("") is None
