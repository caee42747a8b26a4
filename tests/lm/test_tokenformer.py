"""TokenFormer beyond the CausalLM contract: sizes, initialisation, the stack's options, refusals, its baseline."""

from __future__ import annotations

import dataclasses
import functools
import math

import causal_lms
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtok.interop.tensors import expected_shapes
from jaxtok.lm.decoder import Decoder, init_params
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import PUBLISHED, TokenFormerConfig, tpu_variant, uniform_counts
from jaxtok.lm.transformer import TransformerConfig, matched_transformer
from jaxtok.nn.losses import cross_entropy, masked_mean

TASKS = {
    "tokenformer": lambda: tiny.text(tiny.TOKENFORMER),
    "transformer": lambda: tiny.text(matched_transformer(tiny.TOKENFORMER)),
}

EVIDENCE = {"tokenformer": {"grow": "training/test_mesh.py::test_growth_happens_where_the_parameters_are"}}

CAUSAL_LMS = {
    "tokenformer": lambda: Decoder(
        TokenFormerConfig(**causal_lms.SIZES, tokens=uniform_counts(attention=12, ffn=20, output=9))
    ),
    "transformer": lambda: Decoder(TransformerConfig(**causal_lms.SIZES, mlp_dim=24)),
}

TINY = TokenFormerConfig(
    num_layers=2,
    d_model=16,
    num_heads=2,
    rotary_fraction=0.5,
    tokens=uniform_counts(attention=12, ffn=20, output=9),
    vocab_size=32,
    max_length=12,
)
TOKENS = jax.random.randint(jax.random.key(2), (2, 9), 0, 32)


@pytest.fixture(scope="module")
def params():
    init = jax.jit(lambda: init_params(Decoder(TINY), jax.random.key(0), TOKENS))
    return jax.tree.map(lambda x: 4 * x, init())  # weights of a trained model's size


@functools.partial(jax.jit, static_argnames="config")
def loss_and_gradient(config, params):
    def loss(params):
        logits, _ = Decoder(config).apply({"params": params}, TOKENS[:, :-1])
        return cross_entropy(logits, TOKENS[:, 1:]).mean(), logits

    (loss, logits), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return loss, logits, gradient


def assert_trees_close(ours, reference, rtol):
    def close(path, a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * np.abs(b).max(), err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(close, ours, reference)


def count(config) -> int:
    return sum(math.prod(shape) for shape in expected_shapes(config).values())


@pytest.mark.parametrize(
    ("name", "published", "tolerance"),
    [
        ("150m", 151_881_216, 0),
        ("450m", 454_166_528, 0),
        ("900m", 903_252_480, 0),
        ("1.5b", 1_587_219_456, 0),
        ("owt-354m", 353_503_232, 0),
        ("owt-757m", 756_156_416, 0),
        ("124m", 123_569_664, 0),
        ("354m", 354_190_848, 0),
        ("757m", 757e6, 0.01),
        ("1.4b", 1.31e9, 0.01),
    ],
)
def test_published_sizes(name, published, tolerance):
    config = PUBLISHED[name]
    assert abs(count(config) - published) <= tolerance * published


def test_every_published_size_is_checked():
    checked = {args[0] for args in test_published_sizes.pytestmark[0].args[1]}
    assert checked == set(PUBLISHED)


def test_initialisation():
    config = dataclasses.replace(TINY, d_model=64, tokens=uniform_counts(attention=96, ffn=192), vocab_size=256)
    shapes = jax.jit(lambda: init_params(Decoder(config), jax.random.key(0), TOKENS))()
    value_std = 2 / (config.num_layers * math.sqrt(config.d_model))
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        match path[-1]:
            case "scale":
                assert (leaf == 1).all()
            case "bias":
                assert (leaf == 0).all()
            case "embedding" | "keys" | "values":
                std = value_std if path[-1] == "values" else 0.02
                assert abs(leaf.mean()) < 5 * std / math.sqrt(leaf.size)
                assert abs(leaf.std() / std - 1) < 5 / math.sqrt(2 * leaf.size)
                if path[-1] != "embedding":  # every layer has its own
                    assert (leaf[0] != leaf[1]).mean() > 0.99
            case other:
                pytest.fail(f"no expectation for {other}")


@pytest.fixture(scope="module")
def reference(params):
    return loss_and_gradient(TINY, params)


@pytest.mark.parametrize("options", [{"unroll": 2}, {"remat": "full"}, {"remat": "dots"}], ids=str)
def test_how_layers_run_changes_no_value(params, reference, options):
    result = loss_and_gradient(dataclasses.replace(TINY, **options), params)
    assert_trees_close(result, reference, 1e-5)


def test_bfloat16_computation_keeps_float32_parameters_and_gradients(params, reference):
    loss, logits, gradient = loss_and_gradient(dataclasses.replace(TINY, dtype="bfloat16"), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype("float32")}
    assert loss.dtype == logits.dtype == jnp.float32
    assert abs(loss - reference[0]) < 0.02 * reference[0]

    def cosine(a, b):
        a, b = np.asarray(a).ravel(), np.asarray(b).ravel()
        return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))

    assert min(jax.tree.leaves(jax.tree.map(cosine, gradient, reference[2]))) > 0.95


@functools.partial(jax.jit, static_argnames="config")
def logits_of(config, params):
    return Decoder(config).apply({"params": params}, TOKENS[:, :-1])[0]


def test_dropout_only_in_training(params, reference):
    both = dataclasses.replace(TINY, dropout=0.3, pattention_dropout=0.3)
    np.testing.assert_allclose(logits_of(both, params), reference[1], atol=1e-4)
    batch = {"tokens": TOKENS[:, :-1], "targets": TOKENS[:, 1:], "positions": None, "segments": None}
    batch |= {"mask": jnp.ones(TOKENS[:, 1:].shape), "bytes": jnp.ones(TOKENS[:, 1:].shape)}
    for option in ("dropout", "pattention_dropout"):
        task = LanguageModeling(model=dataclasses.replace(TINY, **{option: 0.3}))
        loss = jax.jit(lambda rng, task=task: task.loss(params, batch, rng, 0)[0])
        train, again, other = (float(loss(jax.random.key(i))) for i in (0, 0, 1))
        assert train == again
        assert len({train, other, float(reference[0])}) == 3


def test_the_program_does_not_grow_with_depth():
    def equations(jaxpr) -> int:
        inner = sum(equations(j) for eqn in jaxpr.eqns for j in jax.core.jaxprs_in_params(eqn.params))
        return len(jaxpr.eqns) + inner

    def size(layers):
        config = dataclasses.replace(TINY, num_layers=layers, remat="full")
        params = jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0), TOKENS))
        return equations(jax.make_jaxpr(functools.partial(loss_and_gradient, config))(params).jaxpr)

    assert size(4) == size(24) > 100


def test_the_rotary_base_reaches_the_model(params, reference):
    assert jnp.abs(logits_of(dataclasses.replace(TINY, rotary_base=10.0), params) - reference[1]).max() > 1e-3


def test_tpu_variant():
    config = tpu_variant(TINY)
    assert (config.tanh_gelu, config.normalization_eps, config.rotary_fraction) == (True, 1e-5, 0.0)
    assert tpu_variant(dataclasses.replace(TINY, normalization="gelu_l2_norm")).normalization_eps == 1e-8


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("normalization", "l1", "l2_norm_gelu"),
        ("norm", "batchnorm", "layernorm_nonparam"),
        ("final_norm", "batchnorm", "layernorm_nonparam"),
        ("num_heads", 3, "divide d_model = 16"),
        ("rotary_fraction", 0.4, "3 of the 8 channels"),
        ("rotary_fraction", 0.1, "0 of the 8 channels"),
        ("rotary_fraction", 1.5, r"\[0, 1\]"),
        ("num_layers", 0, "at least 1"),
        ("unroll", 0, "at least 1"),
        ("dropout", 1.0, r"\[0, 1\)"),
        ("pattention_dropout", 1.0, r"\[0, 1\)"),
        ("remat", "everything", "full"),
        ("dtype", "float8", "bfloat16"),
        ("param_dtype", "float16", "float32"),
        ("vocab_size", -1, "positive"),
        ("max_length", 0, "at least 1"),
    ],
)
def test_an_impossible_config_names_the_field_and_what_is_allowed(field, value, allowed):
    with pytest.raises(ValueError, match=f"^{field} is {value!r}.*{allowed}"):
        dataclasses.replace(TINY, **{field: value})


def test_impossible_inputs_are_refused(params):
    model = Decoder(TINY)
    with pytest.raises(ValueError, match=r"13 tokens in a row.*max_length is 12"):
        model.apply({"params": params}, jnp.zeros((1, 13), jnp.int32))
    with pytest.raises(ValueError, match="segments and a cache"):
        segments = jnp.ones_like(TOKENS)
        model.apply({"params": params}, TOKENS, segments=segments, cache=model.init_cache(*TOKENS.shape))
    with pytest.raises(ValueError, match="vocab_size is 0"):
        init_params(Decoder(dataclasses.replace(TINY, vocab_size=0)), jax.random.key(0), TOKENS)
    # An id beyond the vocabulary cannot raise under jit, but it must not be taken for another token either.
    assert jnp.isnan(jax.jit(model.apply)({"params": params}, jnp.array([[3, 32]]))[0]).all()


def test_a_mask_of_zeros_gives_loss_zero():
    assert masked_mean(jnp.array([1.0, 2.0]), jnp.zeros(2)) == 0
    assert masked_mean(jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])) == 2


@pytest.mark.parametrize("name", ["124m", "450m"])
def test_matched_transformer_has_the_same_size_but_for_the_norms(name):
    config = PUBLISHED[name]
    transformer = matched_transformer(config)
    assert isinstance(transformer, TransformerConfig)
    norms = 4 * config.d_model * config.num_layers  # scale and bias of two norms; TokenFormer's have none
    assert count(transformer) == count(config) + norms
    assert transformer.flops(1024) == config.flops(1024)


def test_a_transformer_cannot_match_too_few_tokens():
    with pytest.raises(ValueError, match=r"30 parameter tokens.*more than 2 d_model = 32"):
        matched_transformer(dataclasses.replace(TINY, tokens=uniform_counts(6, 6)))
    with pytest.raises(ValueError, match="mlp_dim is 0"):
        TransformerConfig(mlp_dim=0)
