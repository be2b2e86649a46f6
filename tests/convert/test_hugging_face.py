"""Models of transformers, in and out. Importing it costs seconds: only here, and by a fixture."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from torch import Tensor

from distmoe.checkpoint.layouts import run_config
from distmoe.checkpoint.load_model import load_model
from distmoe.checkpoint.manifest import damage, read_manifest
from distmoe.checkpoint.store import CheckpointStore
from distmoe.checkpoint.tensors import read_tensors, saved_tensors
from distmoe.config import Config, resolve, to_toml
from distmoe.config.keys import with_values
from distmoe.convert.from_hf import import_model
from distmoe.convert.to_hf import export_model
from distmoe.kernels.testing import assert_as_good_as
from distmoe.model.generate import generate
from distmoe.model.init import initialize
from distmoe.model.transformer import Transformer

ROOT = Path(__file__).parents[2]
SIZES: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_experts_per_tok=2,
    max_position_embeddings=64,
    # Far from 0, so that routing and attention are not nearly even.
    initializer_range=0.3,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LATENT: dict[str, Any] = dict(
    num_key_value_heads=4,
    kv_lora_rank=24,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=12,
    intermediate_size=40,
    moe_intermediate_size=24,
    n_routed_experts=8,
    n_shared_experts=2,
    n_group=4,
    topk_group=2,
)
OWN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": (
        "Qwen3MoeConfig",
        dict(
            head_dim=16,
            intermediate_size=40,
            moe_intermediate_size=24,
            num_experts=8,
            norm_topk_prob=True,
            mlp_only_layers=[0],
            tie_word_embeddings=True,
        ),
    ),
    "olmoe": ("OlmoeConfig", dict(intermediate_size=24, num_experts=8, clip_qkv=0.9)),
    "mixtral": ("MixtralConfig", dict(intermediate_size=24, num_local_experts=8)),
    "deepseek_v2": (
        "DeepseekV2Config",
        dict(
            **LATENT,
            q_lora_rank=None,
            topk_method="group_limited_greedy",
            routed_scaling_factor=1.5,
            first_k_dense_replace=0,
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=20.0,
                factor=4.0,
                original_max_position_embeddings=64,
                beta_fast=4.0,
                mscale=1.5,
                mscale_all_dim=0.7,
            ),
        ),
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        dict(
            **LATENT,
            q_lora_rank=20,
            # Not that of the latents.
            rms_norm_eps=1e-2,
            first_k_dense_replace=1,
            num_mtp_layers=0,
            # Kimi K2 has no ramp between frequencies that stay and those that do not, either.
            rope_parameters=dict(
                rope_type="yarn",
                rope_theta=20.0,
                factor=4.0,
                original_max_position_embeddings=16,
                beta_fast=1.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
            ),
        ),
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        dict(
            head_dim=12,
            intermediate_size=40,
            moe_intermediate_size=24,
            n_routed_experts=8,
            attention_bias=True,
            use_qk_norm=True,
            routed_scaling_factor=1.5,
            num_mtp_layers=0,
        ),
    ),
}
# Stays in float32, whatever the weights are.
BIAS = "e_score_correction_bias"
TOKENS_BS = torch.randint(3, 64, (4, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=sorted(OWN))
def model_dir(
    transformers: Any, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A random model in several files; norms are random, too, as 1 would hide a missing one."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    kind, own = OWN[request.param]
    config = getattr(transformers, kind)(**SIZES | own)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("proj.bias"):
                parameter.uniform_(-0.5, 0.5)
        for name, buffer in model.named_buffers():
            if BIAS in name:
                # Whole units of our keys.
                buffer.copy_(torch.randint(-1 << 22, 1 << 22, buffer.shape) / (1 << 24))
    model.save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@pytest.fixture(scope="module")
def checkpoint(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_model(model_dir, tmp_path_factory.mktemp("imported") / "tiny")


@pytest.fixture(scope="module")
def logits_BSV(transformers: Any, model_dir: Path) -> tuple[Tensor, Tensor]:
    """Those of transformers in float32 and in float64."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(TOKENS_BS).logits
        # Grouped products are of lower precision.
        model.set_experts_implementation("eager")
        return logits, model.double()(TOKENS_BS).logits


def weights_of(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}


def test_logits_of_one_rank_are_those_of_transformers(
    checkpoint: Path, logits_BSV: tuple[Tensor, Tensor]
) -> None:
    config, model = load_model(checkpoint, torch.device("cpu"))
    with torch.no_grad():
        own_BSV = model(TOKENS_BS)
    assert damage(checkpoint) == []
    assert_as_good_as(own_BSV, *logits_BSV)


def _logits_of_rank(rank: int, config: Config, tensors: dict[str, Tensor]) -> Tensor:
    world, num_local = config.parallel.ep, config.moe.num_experts // config.parallel.ep
    model = Transformer(config, ep_group=dist.group.WORLD).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            whole = tensors[f"model.{name}"]
            own = whole[rank * num_local :][:num_local] if ".experts." in name else whole
            tensor.copy_(own)
        return model(TOKENS_BS.chunk(world)[rank])


@pytest.mark.parametrize("ep", [2, 4])
def test_logits_of_several_ranks(
    ep: int, checkpoint: Path, logits_BSV: tuple[Tensor, Tensor]
) -> None:
    settings = {"parallel.ep": ep, "moe.dispatch.exchange": "threaded", "parallel.dp_shard": 0}
    config = run_config(read_manifest(checkpoint))
    config = resolve(with_values(config, {**settings, "parallel.engine": "fsdp2"}), ep)
    tensors = read_tensors(checkpoint, saved_tensors(checkpoint, "model"))
    own_BSV = torch.cat(run_ranks(_logits_of_rank, ep, config, tensors))
    assert_as_good_as(own_BSV, *logits_BSV)


def test_round_trip_is_equal_and_transformers_generates(
    transformers: Any, model_dir: Path, checkpoint: Path, tmp_path: Path
) -> None:
    files = export_model(checkpoint, tmp_path / "out", max_bytes=40_000)
    assert sum(file.suffix == ".safetensors" for file in files) > 1
    before, after = weights_of(model_dir), weights_of(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    for folder in (model_dir, tmp_path / "out"):
        config = transformers.AutoConfig.from_pretrained(folder).to_dict()
        assert json.loads((model_dir / "config.json").read_text()).items() <= config.items()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    prompt = TOKENS_BS[:1, :5]
    theirs = model.generate(
        prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    _, ours = load_model(checkpoint, torch.device("cpu"))
    assert [*generate(ours, prompt[0].tolist(), count=8)] == theirs[0, 5:].tolist()


def test_bfloat16_comes_back_as_it_was(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bf16"
    folder.mkdir()
    biases = {name: tensor for name, tensor in weights_of(model_dir).items() if BIAS in name}
    weights = {name: tensor.bfloat16() for name, tensor in weights_of(model_dir).items()} | biases
    save_file(weights, folder / "model.safetensors")
    # Its config.json says float32 still, as those of some published models do.
    (folder / "config.json").write_text((model_dir / "config.json").read_text())
    export_model(import_model(folder, tmp_path / "in"), tmp_path / "out")
    after = weights_of(tmp_path / "out")
    assert all(torch.equal(weights[name], after[name]) for name in weights)
    assert all(tensor.dtype == torch.bfloat16 for name, tensor in after.items() if BIAS not in name)


@pytest.mark.parametrize("model_dir", ["deepseek_v3"], indirect=True)
def test_layers_that_predict_further_tokens_are_left_out(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "further"
    folder.mkdir()
    weights = weights_of(model_dir)
    further = {"model.layers.3.enorm.weight": torch.ones(32), "model.layers.3.x": torch.ones(1)}
    save_file(weights | further, folder / "model.safetensors")
    hf = json.loads((model_dir / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**hf, "num_nextn_predict_layers": 1}))
    export_model(import_model(folder, tmp_path / "in"), tmp_path / "out")
    settings = tomllib.loads((tmp_path / "in" / "config.toml").read_text())
    assert settings["model"]["mla"]["kv_lora_rank"] == hf["kv_lora_rank"]
    assert "left out: 2 tensors of layers that predict further tokens" in capsys.readouterr().out
    assert weights_of(tmp_path / "out").keys() == weights.keys()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == hf


def test_a_model_without_biases_gets_some_of_zero(transformers: Any, tmp_path: Path) -> None:
    settings = {
        "model.attention": "mla",
        "model.vocab_size": 64,
        "model.hidden_size": 32,
        "moe.router": "sigmoid_topk",
        "data.seq_len": 20,
    }
    config = resolve(with_values(Config(), settings), 1)
    with torch.device("meta"):
        model = Transformer(config)
    initialize(model.to_empty(device="cpu"), seed=1)
    about = {"distmoe": "0", "world": 1, "engine": "single", "ep": 1, "config": to_toml(config)}
    store = CheckpointStore(
        tmp_path / "run", group=None, keep_last=1, asynchronous=False, about=about
    )
    store.save(0, {"model": dict(model.named_parameters())})
    export_model(tmp_path / "run" / "step-00000000", tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    )
    assert theirs.config.model_type == "deepseek_v3"
    biases = [tensor for name, tensor in weights_of(tmp_path / "out").items() if BIAS in name]
    assert len(biases) == 3
    assert not torch.cat(biases).any()
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(TOKENS_BS), theirs(TOKENS_BS).logits)
