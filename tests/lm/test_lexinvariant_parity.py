"""Lexinvariant models against an independent numpy implementation in float64, for whatever sizes a file has."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.lm.lexinvariant import Lexinvariant, LexinvariantConfig
from jaxtok.nn.relative import distance_buckets

NAMES = {  # of a layer's parameters
    "wq": ("attention", "query", "kernel"),
    "wk": ("attention", "key", "kernel"),
    "wv": ("attention", "value", "kernel"),
    "wo": ("attention", "output", "kernel"),
    "wi": ("ffn", "up", "kernel"),
    "wo_mlp": ("ffn", "down", "kernel"),
    "attn_norm": ("norm_attention", "scale"),
    "mlp_norm": ("norm_ffn", "scale"),
}


def load(golden):
    sizes = golden.config
    config = LexinvariantConfig(
        num_layers=sizes["layers"],
        d_model=sizes["d_model"],
        num_heads=sizes["heads"],
        head_size=sizes["head_dim"],
        mlp_dim=sizes["d_ff"],
        vocab_size=sizes["vocab"],
        max_length=sizes["T"],
        norm_eps=sizes["eps"],
        relative_buckets=sizes["rel_buckets"],
        relative_distance=sizes["rel_max_distance"],
    )
    return Lexinvariant(config, readout_scale=sizes["readout_scale"]), from_flat(config, golden.under("params"))


def from_flat(config, arrays):
    blocks: dict = {}
    for theirs, (*folders, leaf) in NAMES.items():
        branch = blocks
        for folder in folders:
            branch = branch.setdefault(folder, {})
        branch[leaf] = jnp.stack([arrays[f"layer.{k}.{theirs}"] for k in range(config.num_layers)])
    return {
        "stack": {"blocks": blocks},
        "relative_bias": {"table": jnp.asarray(arrays["rel_bias"])},
        "final_norm": {"scale": jnp.asarray(arrays["final_norm"])},
    }


def to_flat(config, params):
    arrays = {"rel_bias": params["relative_bias"]["table"], "final_norm": params["final_norm"]["scale"]}
    for theirs, path in NAMES.items():
        stacked = functools.reduce(lambda tree, key: tree[key], path, params["stack"]["blocks"])
        arrays |= {f"layer.{k}.{theirs}": stacked[k] for k in range(config.num_layers)}
    return arrays


@functools.partial(jax.jit, static_argnums=0)
def run(model, params, table, tokens):
    """(mean loss, (nats, hidden states, logits)) and the loss's gradient."""

    def loss(params):
        embedded = model.apply({"params": params}, tokens, table=table, method="embed")
        hidden, _ = model.apply({"params": params}, embedded, method="hidden")
        logits = model.apply({"params": params}, hidden, table=table, method="head")
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        nats = model.apply({"params": params}, inputs, targets, table=table, method="nats")
        return nats.mean(), (nats, hidden, logits)

    return jax.value_and_grad(loss, has_aux=True)(params)


@pytest.mark.parity("lexinvariant/*.npz")
def test_lexinvariant(golden, parity):
    model, params = load(golden)
    (loss, (nats, hidden, logits)), gradient = run(model, params, golden["in/embeddings"], golden["in/tokens"])
    parity("hidden", hidden, golden["out/hidden"])
    parity("logits", logits, golden["out/logits"])
    parity("nats", nats, golden["out/nll"])
    parity("loss", loss, golden["out/loss_f64"], rtol=1e-5)
    flat, names = to_flat(model.config, gradient), golden.config["fd_param_names"]
    ours = [np.asarray(flat[names[parameter]]).flat[entry] for parameter, entry in golden["grad/fd_index"]]
    np.testing.assert_allclose(ours, golden["grad/fd_value_f64"], rtol=1e-4, atol=1e-7)
    parity("gradient", np.array(ours), golden["grad/fd_value_f64"])


@pytest.mark.parity("lexinvariant/*.npz")
def test_semi_lexinvariant(golden, parity):
    model, params = load(golden)
    random = golden["in/random_mask"].astype(bool)[..., None]
    table = np.where(random, golden["in/embeddings"], golden["in/learned_table"])
    (loss, (nats, _, logits)), _ = run(model, params, table, golden["in/tokens"])
    parity("mixed logits", logits, golden["out/mixed_logits"])
    parity("mixed nats", nats, golden["out/mixed_nll"])
    parity("mixed loss", loss, golden["out/mixed_loss_f64"], rtol=1e-5)


@pytest.mark.parity("lexinvariant/*.npz")
def test_renamed_symbols(golden, parity):
    model, params = load(golden)
    renamed = golden["in/permutation"]
    table = np.empty_like(golden["in/embeddings"])
    table[:, renamed] = golden["in/embeddings"]
    _, (nats, hidden, logits) = run(model, params, table, renamed[golden["in/tokens"]])[0]
    parity("hidden, renamed", hidden, golden["out/hidden"])
    parity("logits, renamed", logits[..., renamed], golden["out/logits"])
    parity("nats, renamed", nats, golden["out/nll"])


@pytest.mark.parity("lexinvariant/*.npz")
def test_buckets(golden):
    places = np.minimum(np.arange(golden["out/causal_buckets"].size), 128)
    np.testing.assert_array_equal(distance_buckets(32, 128)[places], golden["out/causal_buckets"])
