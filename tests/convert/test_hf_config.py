"""What of a config.json, or of a run's settings, has no counterpart is refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from distmoe.config import Config, ConfigError, YarnConfig, check, load_config, resolve
from distmoe.config.keys import with_values
from distmoe.convert.cli import main
from distmoe.convert.hf_config import hf_config_of, settings_of

HF: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 16,
    "norm_topk_prob": True,
}
# Keys that both have, and keys of one that are nothing to the other.
DEEPSEEK = {
    **HF,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "n_group": 1,
    "topk_group": 1,
}
V3 = {**DEEPSEEK, "model_type": "deepseek_v3"}
# As published, but for the weights in fp8.
KIMI_K2 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "vocab_size": 163840,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 1,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 384,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "num_nextn_predict_layers": 0,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-06,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
V2 = {**DEEPSEEK, "model_type": "deepseek_v2", "norm_topk_prob": False}
V2_GROUPS = {**V2, "topk_method": "group_limited_greedy"}
OLMOE = {**HF, "model_type": "olmoe"}
MIXTRAL = {**HF, "model_type": "mixtral", "num_local_experts": 4}
NOT_OURS = [
    (
        HF,
        "model_type",
        "qwen3_next",
        "'qwen3_next'; it must be one of .*deepseek_v3, kimi_k2, glm4",
    ),
    (KIMI_K2, "quantization_config", {"quant_method": "fp8"}, "{.*}; it must be None: .*fp8_cast"),
    (HF, "model_type", "llama", "'llama'; it must be one of qwen3_moe, olmoe, mixtral, deepseek"),
    (HF, "attention_bias", True, "True; it must be False: projections have no bias"),
    (HF, "hidden_act", "gelu", "'gelu'; it must be 'silu': experts are SwiGLU"),
    (HF, "decoder_sparse_step", 2, "2; it must be 1: every layer after"),
    (HF, "mlp_only_layers", [1], r"\[1\]; it must be the first layers"),
    (HF, "use_sliding_window", True, "True; it must be False: attention sees all"),
    (HF, "quantization_config", {"bits": 4}, "{'bits': 4}; it must be None: weights must"),
    (HF, "num_experts", None, "not in config.json; it must be there"),
    (OLMOE, "head_dim", 16, r"16; it must be hidden_size \(32\) / num_attention_heads \(4\)"),
    (MIXTRAL, "sliding_window", 4096, "4096; it must be None: attention sees all"),
    (MIXTRAL, "router_jitter_noise", 0.1, "0.1; it must be 0.0: the router adds no noise"),
    (V3, "num_key_value_heads", 2, r"2; it must be num_attention_heads \(4\): every head has"),
    (V3, "rope_interleave", False, "False; it must be True: RoPE turns neighbours"),
    (V3, "topk_method", "greedy", "'greedy'; it must be 'noaux_tc': a group counts as its two"),
    (V3, "quantization_config", {"quant_method": "fp8"}, "{.*}; it must be None: .*fp8_cast_bf16"),
    (V2, "topk_method", "noaux_tc", "'noaux_tc'; it must be one of greedy, group_limited_greedy"),
    (V2, "norm_topk_prob", True, "True; it must be False: a pair's weight is its score"),
    (V2_GROUPS, "n_group", None, "None; it must be at least 1 with topk_method 'group_limited_gre"),
    (V2_GROUPS, "topk_group", None, "None; it must be at least 1 with topk_method 'group_limited"),
    (HF, "rope_theta", "big", "'big'; it must be a number"),
]


@pytest.mark.parametrize(
    ("hf", "key", "value", "message"), NOT_OURS, ids=lambda value: str(value)[:20]
)
def test_import_refuses(hf: dict[str, Any], key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key} is {message}"):
        settings_of({**hf, key: value})


@pytest.mark.parametrize(
    "rope", [{"rope_scaling": {"type": "yarn"}}, {"rope_parameters": {"rope_type": "yarn"}}]
)
def test_scaled_positions_are_refused(rope: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="rope_type is 'yarn'; it must be 'default'"):
        settings_of({**HF, **rope})


YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"type": "linear"}, "it must be null or have rope_type 'yarn'"),
        ({"attention_factor": 1.2}, "it must be without attention_factor"),
        ({"mscale_all_dim": 1.0}, "it must have mscale with mscale_all_dim"),
        ({"factor": "long"}, "it must have a number as factor"),
        ({"factor": None}, "it must have a number as factor"),
        ({"beta_fast": "x"}, "it must have a number as beta_fast"),
        (
            {"original_max_position_embeddings": 4096.5},
            "it must have a whole number as original_max_position_embeddings",
        ),
    ],
)
def test_yarn_that_is_not_deepseeks_is_refused(change: dict[str, Any], message: str) -> None:
    assert settings_of({**V3, "rope_scaling": YARN})["model.yarn.factor"] == 40.0
    with pytest.raises(ConfigError, match=f"rope_scaling is {{.*}}; {message}"):
        settings_of({**V3, "rope_scaling": {**YARN, **change}})


def test_kimi_k2_is_a_deepseek_v3() -> None:
    settings = settings_of(KIMI_K2)
    assert settings == settings_of({**KIMI_K2, "model_type": "deepseek_v3"})
    shape = load_config(Path(__file__).parents[2] / "configs/models/kimi_k2.toml")
    config = with_values(shape, settings)
    check(config, 512, with_data=False)
    # The preset is of the training before YaRN.
    before = {"model.yarn": YarnConfig(), "moe.group_score": shape.moe.group_score}
    assert with_values(config, before) == shape
    assert hf_config_of(resolve(config, 512), source=KIMI_K2) == KIMI_K2


def test_yarn_is_read_and_written() -> None:
    yarn = {"model.yarn.factor": 8.0, "model.yarn.mscale": 0.5, "model.yarn.mscale_all_dim": 0.5}
    longer = resolve(with_values(Config(), {**settings_of(V3), **yarn}), 1)
    new = {**V3, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    for source in (V3, new, None):
        hf = hf_config_of(longer, source=source, model_type="deepseek_v3")
        assert resolve(with_values(Config(), settings_of(hf)), 1).model.yarn == longer.model.yarn
    assert hf_config_of(longer, source=new)["rope_parameters"]["rope_theta"] == 10000.0
    with pytest.raises(ConfigError, match="model.yarn is .*; for deepseek_v3 it must have mscale"):
        hf_config_of(with_values(longer, {"model.yarn.mscale": 0.0}), model_type="deepseek_v3")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("moe.shared_intermediate_size", 8, "moe.shared_intermediate_size is 8; qwen3_moe has 0"),
        ("moe.bias_update_rate", 0.1, "moe.bias_update_rate is 0.1; qwen3_moe has 0.0"),
        ("moe.router", "hash", "moe.router is 'hash'; mixtral has"),
        ("model.clip_qkv", 1.0, "model.clip_qkv is 1.0; qwen3_moe has 0.0"),
    ],
)
def test_export_refuses(key: str, value: Any, message: str) -> None:
    config = resolve(with_values(Config(), {"model.vocab_size": 64, key: value}), 1)
    with pytest.raises(ConfigError, match=message):
        hf_config_of(config)


def test_export_needs_whole_shared_experts_and_the_groups_of_deepseek() -> None:
    settings = {**settings_of(V3), "moe.expert_groups": 2, "moe.groups_per_token": 1}
    config = resolve(with_values(Config(), settings), 1)
    assert hf_config_of(config)["n_group"] == 2
    wrong = {"moe.shared_intermediate_size": 12, "moe.group_score": "max"}
    with pytest.raises(ConfigError) as error:
        hf_config_of(with_values(config, wrong), model_type="deepseek_v3")
    shared, groups = error.value.problems
    assert shared.endswith("12; for deepseek_v3 it must be a multiple of moe.intermediate_size (8)")
    assert "moe.expert_groups is 2; for deepseek_v3 it must be 0 with moe.group_score" in groups


def test_groups_are_read_and_written() -> None:
    def read(hf: dict[str, Any], groups: int | None, per_token: int | None) -> tuple[int, int]:
        found = settings_of({**hf, "n_group": groups, "topk_group": per_token})
        return found["moe.expert_groups"], found["moe.groups_per_token"]

    limited = {**V2, "topk_method": "group_limited_greedy"}
    assert read(V3, 4, 1) == read(limited, 4, 1) == (4, 1)
    assert read(V3, 1, 1) == read(V2, 4, 1) == read(V2, None, None) == (0, 0)
    settings = {**settings_of(V3), "moe.expert_groups": 4, "moe.groups_per_token": 1}
    written = hf_config_of(resolve(with_values(Config(), settings), 1), source=V3)
    assert (written["n_group"], written["topk_group"]) == (4, 1)
    assert written["num_nextn_predict_layers"] == 0


SIGMOID = {
    "moe.router": "sigmoid_topk",
    "moe.bias_update_rate": 0.001,
    "moe.group_score": "top2",
    "moe.shared_intermediate_size": 256,
}
LATENT = {"model.attention": "mla", "model.mla.q_lora_rank": 16}
GROUPS_BY_BEST = {"moe.group_score": "max", "moe.expert_groups": 4, "moe.groups_per_token": 2}


@pytest.mark.parametrize(
    ("settings", "model_type"),
    [
        ({}, "qwen3_moe"),
        ({"model.n_dense_layers": 0, "model.qk_norm_scope": "projection"}, "olmoe"),
        ({"model.n_dense_layers": 0, "model.qk_norm": False}, "mixtral"),
        ({**LATENT, "moe.renormalize": "none", "moe.group_score": "max"}, "deepseek_v2"),
        ({**LATENT, **GROUPS_BY_BEST, "moe.renormalize": "none"}, "deepseek_v2"),
        ({**LATENT, **SIGMOID, "moe.score_scale": 2.5}, "deepseek_v3"),
        (
            {**SIGMOID, "model.qkv_bias": True, "model.partial_rotary_factor": 0.25},
            "glm4_moe",
        ),
    ],
)
def test_architecture_is_the_one_that_fits(settings: dict[str, Any], model_type: str) -> None:
    config = resolve(with_values(Config(), {"model.vocab_size": 64, **settings}), 1)
    hf = hf_config_of(config)
    assert hf["model_type"] == model_type
    # What was written is read back.
    again = resolve(with_values(Config(), settings_of(hf)), 1)
    moe = replace(again.moe, router=config.moe.router)
    assert (again.model, moe) == (
        replace(config.model, intermediate_size=again.model.intermediate_size),
        config.moe,
    )


def test_a_setting_that_was_changed_is_written_and_the_rest_is_kept() -> None:
    source = {**HF, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "x": 1}
    config = resolve(with_values(Config(), settings_of(source)), 1)
    changed = with_values(config, {"model.rope_theta": 5e5, "moe.renormalize": "none"})
    assert hf_config_of(config, source=source) == source
    assert hf_config_of(changed, source=source) == {
        **source,
        "norm_topk_prob": False,
        "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
    }


def test_command_names_tensors_that_do_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF))
    tensors = {"model.norm.weight": torch.ones(31), "visual.weight": torch.ones(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert main(["from-hf", str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "error: model.embed_tokens.weight is missing; it is needed for embedding.weight" in error
    assert "more such tensors" in error
    assert not (tmp_path / "out").exists()


def test_command_refuses_files_that_it_cannot_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def error() -> str:
        assert main(["from-hf", str(tmp_path), str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "config.json cannot be read" in error()
    (tmp_path / "config.json").write_text(json.dumps(HF))
    assert "has neither model.safetensors nor model.safetensors.index.json" in error()
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    assert "model.safetensors cannot be read" in error()
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "lacks model-1.safetensors, which model.safetensors.index.json names" in error()
    assert main(["to-hf", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "CHECKPOINT is" in capsys.readouterr().err
