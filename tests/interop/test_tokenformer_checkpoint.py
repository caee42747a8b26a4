"""TokenFormer checkpoints in the authors' layout: written and read again, and the errors of files that do not fit."""

from __future__ import annotations

import dataclasses
import importlib.util
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from jaxtok.interop.tensors import expected_shapes
from jaxtok.interop.tokenformer import (
    config_from_official,
    official_config,
    params_from_official,
    params_to_official,
    read_official,
    write_official,
)
from jaxtok.lm.tokenformer import TokenCounts, TokenFormerConfig, tpu_variant, uniform_counts
from jaxtok.transfer.growth import grow

CONFIG = TokenFormerConfig(
    num_layers=2,
    d_model=16,
    num_heads=2,
    rotary_fraction=0.5,
    tokens=uniform_counts(attention=6, ffn=12, output=9),
    vocab_size=24,
    max_length=32,
)
torch_needed = pytest.mark.torch


def random_params(config, seed=0):
    """Parameters in which every tensor has its own values, so that none can be taken for another."""
    rng = np.random.default_rng(seed)
    tree = {}
    for path, shape in expected_shapes(config).items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = rng.standard_normal(shape, np.float32).astype(config.param_dtype)
    return tree


PARAMS = random_params(CONFIG)


def assert_same(ours, reference):
    assert jax.tree.structure(ours) == jax.tree.structure(reference)
    assert jax.tree.map(lambda x: x.dtype, ours) == jax.tree.map(lambda x: x.dtype, reference)
    jax.tree.map(np.testing.assert_array_equal, ours, reference)


def checkpoint(folder, change_config=None, change_tensors=None):
    """A valid checkpoint, then changed."""
    options, tensors = official_config(CONFIG), params_to_official(CONFIG, PARAMS)
    if change_config:
        change_config(options)
    if change_tensors:
        change_tensors(tensors)
    (folder / "config.json").write_text(json.dumps(options))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("torch_bin", [False, pytest.param(True, marks=torch_needed)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tie_embeddings": False},
        {"norm": "layernorm", "final_norm": ""},
        {"norm": "rmsnorm", "final_norm": "rmsnorm", "normalization": "softmax"},
        {"norm": "scalenorm", "final_norm": "layernorm_nonparam", "normalization": "gelu_l2_norm"},
        {"rotary_fraction": 0.0},
        {"rotary_base": 500.0, "dropout": 0.1},
        {"tokens": TokenCounts(query=6, key=7, value=8, output=9, ffn=12)},
        {"norm_tokens": TokenCounts(ffn=5)},
        {"param_dtype": "bfloat16"},
    ],
    ids=str,
)
def test_round_trip(tmp_path, options, torch_bin):
    config = dataclasses.replace(CONFIG, **options)
    params = random_params(config)
    write_official(tmp_path / "new" / "folder", config, params, torch_bin=torch_bin)
    read_config, read = read_official(tmp_path / "new" / "folder")
    assert read_config == config
    assert_same(read, params)


def test_round_trip_of_the_tpu_variant(tmp_path):
    config = tpu_variant(CONFIG)
    assert read_official(write_official(tmp_path, config, PARAMS))[0] == config


def test_round_trip_of_a_grown_model_with_a_fixed_tau(tmp_path):
    grown = grow(CONFIG, PARAMS, to=TokenCounts(value=10, ffn=20), rng=jax.random.key(0))
    config, params = read_official(write_official(tmp_path, grown.config, grown.params))
    assert config == grown.config
    assert config.norm_tokens == TokenCounts(value=6, ffn=12)
    assert_same(params, grown.params)


def test_names_and_layout_are_the_authors(tmp_path):
    tensors = params_to_official(
        dataclasses.replace(CONFIG, tie_embeddings=False), PARAMS | {"head_matrix": np.ones(1)}
    )
    projections = ["attention.query", "attention.key", "attention.value", "attention.proj", "mlp"]
    assert set(tensors) == {
        "sequential.0.word_embeddings.weight",
        *(f"sequential.{i}.{p}.{kind}_param_tokens" for i in (2, 3) for p in projections for kind in ("key", "value")),
        "sequential.5.norm.weight",
        "sequential.5.norm.bias",
        "sequential.6.final_linear.weight",
    }
    attention = PARAMS["stack"]["blocks"]["attention"]
    np.testing.assert_array_equal(
        tensors["sequential.3.attention.key.value_param_tokens"], attention["key"]["values"][1]
    )
    np.testing.assert_array_equal(
        tensors["sequential.2.attention.proj.key_param_tokens"], attention["output"]["keys"][0]
    )


def test_a_released_config_is_read():
    """The keys of the released 150M model's config.json, which says nothing of the vocabulary."""
    released = {
        "architectures": ["TokenFormerForCausalLM"],
        "num_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "qkv_slot_num": 6,
        "proj_slot_num": 9,
        "ffn_slot_num": 12,
        "max_position_embeddings": 32,
        "pos_emb": "rotary",
        "rotary_pct": 0.5,
        "no_weight_tying": False,
        "norm": "layernorm_nonparam",
        "final_norm": "layernorm",
        "norm_activation_type": "l2_norm_gelu",
        "init_method": "normal",
        "output_layer_init_method": "wang_init",
        "torch_dtype": "float16",
    }
    tensors = params_to_official(CONFIG, PARAMS)
    assert config_from_official(released, tensors) == CONFIG
    assert config_from_official(released, tensors, remat="full").remat == "full"


def test_rotary_buffers_are_ignored(tmp_path):
    def add(tensors):
        tensors["sequential.2.attention.rotary_emb.inv_freq"] = np.ones(4, np.float32)

    assert_same(read_official(checkpoint(tmp_path, change_tensors=add))[1], PARAMS)


def test_missing_extra_and_misshaped_tensors_are_named():
    tensors = params_to_official(CONFIG, PARAMS)
    del tensors["sequential.3.attention.key.value_param_tokens"]
    tensors["sequential.9.surprise"] = np.ones(1, np.float32)
    tensors["sequential.5.norm.bias"] = np.ones(15, np.float32)
    with pytest.raises(ValueError) as error:
        params_from_official(CONFIG, tensors)
    for part in (
        "sequential.3.attention.key.value_param_tokens is missing",
        "sequential.9.surprise is unknown",
        "sequential.5.norm.bias has shape (15,) instead of (16,)",
    ):
        assert part in str(error.value)


def test_a_long_list_of_problems_is_cut():
    with pytest.raises(ValueError, match=r"is missing.*\(and 15 more\)"):
        params_from_official(CONFIG, {})


def pop(*keys):
    return lambda mapping: [mapping.pop(key) for key in keys]


def put(**changes):
    return lambda mapping: mapping.update(changes)


@pytest.mark.parametrize(
    ("change_config", "change_tensors", "message"),
    [
        (put(ffn_slot_num=13), None, "sequential.2.mlp.key_param_tokens has 12 rows, but config.json says 13"),
        (put(qkv_slot_num=5), None, "attention.query.key_param_tokens has 6 rows, but config.json says 5"),
        (put(num_layers=3), None, "the tensors have 2 layers, but config.json says 3"),
        (put(padded_vocab_size=64), None, "word_embeddings.weight has 24 rows.*padded_vocab_size = 64"),
        (put(hidden_size=32), None, r"word_embeddings.weight has shape \(24, 16\) instead of \(24, 32\)"),
        (put(no_weight_tying=True), None, "sequential.6.final_linear.weight is missing"),
        (put(norm="layernorm"), None, "sequential.2.input_layernorm.weight is missing"),
        (put(final_norm="layernorm_nonparam"), None, "sequential.5.norm.bias is unknown"),
        (put(norm="batchnorm"), None, "norm is 'batchnorm'"),
        (put(norm_activation_type="l1"), None, "normalization is 'l1'"),
        (put(pos_emb="alibi"), None, "pos_emb is 'alibi'; it must be rotary or none"),
        (put(layernorm_epsilon=1e-6), None, "layernorm_epsilon is 1e-06; it must be 1e-05"),
        (put(gpt_j_residual=True), None, "gpt_j_residual is True; it must be False"),
        (pop("num_layers"), None, "no num_layers"),
        (pop("proj_slot_num"), None, "no proj_slot_num"),
        (None, pop("sequential.0.word_embeddings.weight"), "no tensor sequential.0.word_embeddings.weight"),
        (None, pop("sequential.2.mlp.key_param_tokens"), "no tensor sequential.2.mlp.key_param_tokens"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change_config, change_tensors, message):
    with pytest.raises(ValueError, match=message):
        read_official(checkpoint(tmp_path, change_config, change_tensors))


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/config.json does not exist; give a folder"):
        read_official(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps(official_config(CONFIG)))
    with pytest.raises(FileNotFoundError, match=r"neither model.safetensors nor pytorch_model.bin"):
        read_official(tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="PyTorch is installed")
def test_a_bin_file_without_pytorch_says_what_to_install(tmp_path):
    checkpoint(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ImportError, match="pip install torch"):
        read_official(tmp_path)
    with pytest.raises(ImportError, match="pip install torch"):
        write_official(tmp_path / "new", CONFIG, PARAMS, torch_bin=True)


@torch_needed
def test_a_deepspeed_file_in_float16_is_read(tmp_path):
    import torch

    tensors = {name: torch.from_numpy(a).half() for name, a in params_to_official(CONFIG, PARAMS).items()}
    torch.save({"module": tensors}, tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "config.json").write_text(json.dumps(official_config(CONFIG)))
    assert_same(read_official(tmp_path)[1], jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), PARAMS))
