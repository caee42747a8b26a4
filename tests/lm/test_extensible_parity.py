"""Extensible Tokenization against Hugging Face's classes joined by the paper's equations, for any sizes of a file."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtok.decoding import Sampling, generate
from jaxtok.interop.huggingface import params_from, params_to
from jaxtok.lm.extensible import (
    Extensible,
    ExtensibleConfig,
    document_indices,
    kept_indices,
    row_layout,
    smallest_scale,
)
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.nn.losses import cross_entropy
from jaxtok.protocols import FROZEN
from jaxtok.training.optimizer import OptimizerConfig, descend, learning_rates, make_optimizer


def load(golden) -> tuple[ExtensibleConfig, dict]:
    """The model of a file, and its parameters."""
    sizes, tensors = golden.config, golden.under("params")
    lm = LlamaConfig(
        num_layers=sizes["lm_layers"],
        d_model=sizes["d_model"],
        num_heads=sizes["heads"],
        num_kv_heads=sizes["kv_heads"],
        mlp_dim=sizes["ffn"],
        vocab_size=sizes["vocab"],
        max_length=sizes.get("window", 128),
        norm_eps=sizes["rms_eps"],
        rotary_base=sizes["rope_theta"],
        tie_embeddings="lm.lm_head.weight" not in tensors,
    )
    body = None
    if "et_d_model" in sizes:
        body = dataclasses.replace(lm, d_model=sizes["et_d_model"], mlp_dim=sizes["et_ffn"])
    config = ExtensibleConfig(
        lm=LanguageModeling(model=lm),
        layers=sizes["et_layers"],
        body=body,
        projection=sizes.get("projection", False),
        output_norm=sizes["output_norm"],
        session=sizes.get("session", lm.max_length),
        scale=sizes.get("k", 1) if isinstance(sizes.get("k"), int) else 1,
    )
    return config, {FROZEN: lm_params(lm, tensors, "lm."), "tokenizer": tokenizer_params(config, tensors)}


def lm_params(config, tensors, prefix):
    return params_from(config, {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)})


def tokenizer_params(config, tensors):
    own = {f"model.{name.removeprefix('et.')}": x for name, x in tensors.items() if name.startswith("et.")}
    shape = dataclasses.replace(config.tokenizer, final_norm="rms")
    params = params_from(shape, {"model.norm.weight": np.ones(shape.d_model, np.float32), **own})
    if not config.output_norm:
        del params["final_norm"]
    if "proj.weight" in tensors:
        params["projection"] = {"kernel": jnp.asarray(tensors["proj.weight"].T)}
    return params


def tokenizer_tensors(config, params):
    """The inverse of `tokenizer_params`."""
    rest = {"final_norm": {"scale": np.ones(config.tokenizer.d_model)}} | params
    projection = rest.pop("projection", None)
    found = params_to(dataclasses.replace(config.tokenizer, final_norm="rms"), rest)
    found = {name.replace("model.", "et."): x for name, x in found.items()}
    if not config.output_norm:
        del found["et.norm.weight"]
    return found if projection is None else {**found, "proj.weight": projection["kernel"].T}


@functools.partial(jax.jit, static_argnames=("config", "k", "chunk"))
def loss_at(config, params, ids, k, chunk):
    """The mean nats of rows that share a k, their gradient, and the nats."""

    def loss(params):
        targets = jnp.roll(ids, -1, axis=1)
        nats, _ = Extensible(config).apply({"params": params}, ids, targets, k, chunk, method="nats")
        return nats.mean(), nats

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames="config")
def outputs(config, params, ids):
    return Extensible(config).apply({"params": params}, ids, method="outputs")


@jax.jit
def mean_of(trees):
    return jax.tree.map(lambda *x: sum(x) / len(x), *trees)


layout_of = jax.jit(row_layout, static_argnames=("chunk", "per_chunk", "ets"))


def of_batch(config, params, ids, ks, chunk):
    """Loss, gradient and nats of a batch in which each row has its own k."""
    rows = [loss_at(config, params, row[None], int(k), chunk) for row, k in zip(ids, ks)]
    loss, gradient = mean_of([(value, gradient) for (value, _), gradient in rows])
    return loss, gradient, np.concatenate([nats for (_, nats), _ in rows])


def greedy_groups(chunks, chunk, per_chunk, window):
    """The chunks a, ..., b (from 1, both included) of each call in the paper's figure 3: as many as the window holds
    with the ETs before the last of them."""
    groups, first = [], 2
    while first <= chunks:
        last = first
        while last < chunks and last * per_chunk + (last + 2 - first) * chunk <= window:
            last += 1
        groups.append((first, last))
        first = last + 1
    return groups


@pytest.mark.parity("extensible/tables.npz")
def test_tables(golden):
    for n, k in golden["in/cases"].tolist():
        at = f"{n}_{k}"
        for how in ("strided", "terminal", "random"):
            order = golden[f"in/random_permutation_{at}"] if how == "random" else ()
            np.testing.assert_array_equal(kept_indices(n, k, how, order), golden[f"out/{how}_{at}"])
    for case in golden["in/group_cases"].tolist():
        _, chunk, per_chunk, _ = case
        at = "_".join(map(str, case))
        groups = greedy_groups(*case)
        np.testing.assert_array_equal(groups, golden[f"out/groups_{at}"])
        first, last = groups[-1]
        layout = layout_of(jnp.arange(first, last + 1), chunk, per_chunk, (last - 1) * per_chunk)
        for name, ours in zip(("positions", "mask", "source"), layout):
            np.testing.assert_array_equal(ours, golden[f"out/{name}_{at}"])
    for (document, raw, window), k in zip(golden["in/fit_cases"].tolist(), golden["out/fit_k"].tolist()):
        if k > 0:
            assert smallest_scale(document, raw, window, golden["in/fit_k_set"].tolist()) == k
        else:
            with pytest.raises(ValueError, match=f"a document of {document} tokens and {raw} raw ones do not fit"):
                smallest_scale(document, raw, window, golden["in/fit_k_set"].tolist())


@pytest.mark.parity("extensible/two_stream_*.npz")
def test_two_streams(golden, parity):
    config, params = load(golden)
    ids, ks, chunk = golden["in/ids"], golden["in/k"], golden.config["chunk"]
    parity("outputs", outputs(config, params, ids), golden["mid/et_outputs"])
    for row, k in enumerate(ks.tolist()):
        ours = outputs(config, params, ids[row : row + 1])[0, k - 1 :: k]
        parity("ETs", ours, golden[f"mid/ets_{row}"])
        groups = greedy_groups(ids.shape[1] // chunk, chunk, chunk // k, config.slots)
        np.testing.assert_array_equal(groups, golden[f"mid/groups_{row}"])
        first, last = groups[-1]
        layout = layout_of(jnp.arange(first, last + 1), chunk, chunk // k, (last - 1) * chunk // k)
        for name, ours in zip(("positions", "mask", "source"), layout):
            np.testing.assert_array_equal(ours, golden[f"mid/last_group_{name}_{row}"])
    loss, gradient, nats = of_batch(config, params, ids, ks, chunk)
    parity("nats", nats.reshape(golden["out/nll"].shape), golden["out/nll"])
    parity("loss", loss, golden["out/loss"])
    parity("gradient", tokenizer_tensors(config, gradient["tokenizer"]), golden.under("grad"), rtol=1e-3)


@pytest.mark.parity("extensible/two_stream_*.npz")
def test_logits_of_chunks_alone(golden, parity):
    """The reference computes each chunk by itself, as `read` does."""
    config, params = load(golden)
    ids, chunk = golden["in/ids"], golden.config["chunk"]
    read = jax.jit(lambda *parts: Extensible(config).apply({"params": params}, parts, method="read")[0])
    for row, k in enumerate(golden["in/k"].tolist()):
        ets = outputs(config, params, ids[row : row + 1])[:, k - 1 :: k]
        for number in range(1, ids.shape[1] // chunk):
            seen = number * chunk // k
            logits = read(ets[:, :seen], ids[row : row + 1, number * chunk : (number + 1) * chunk])
            parity("logits", logits[0, seen - 1 : -1], golden["out/logits"][row, number - 1])


@pytest.mark.parity("extensible/streaming*.npz")
def test_streaming(golden, parity):
    config, params = load(golden)
    module, k = Extensible(config), config.scale
    prompt, new = golden["in/prompt"].tolist(), len(golden["out/ids"])
    made = generate(module, params, [prompt], max_new_tokens=new, chooser=Sampling(temperature=0))
    assert made.tokens[0] == golden["out/ids"].tolist()
    ids = jnp.asarray([prompt + made.tokens[0][:-1]])
    logits, cache = jax.jit(lambda ids: module.apply({"params": params}, ids, cache=module.init_cache(*ids.shape)))(ids)
    parity("logits", logits[0, len(prompt) - 1 :], golden["out/logits"])
    assert (int(cache.num_ets[0]), int(cache.num_raw[0])) == tuple(golden["out/state_before"][-1])
    parts, start = [], 0
    for consumed, _, left in golden["out/session_ends"].tolist():
        parts.append(outputs(config, params, ids[:, start : consumed - left])[0, k - 1 :: k])
        start = consumed - left
    parity("ETs", jnp.concatenate(parts), golden["mid/final_ets"])


@pytest.mark.parity("extensible/blend*.npz")
def test_blends_and_derivatives(golden, parity):
    """A document between raw texts, at any k, read by the language model and by one that was made from it."""
    config, params = load(golden)
    prefix, document, tail = (jnp.asarray(golden[f"in/{name}"]) for name in ("prefix", "document", "tail"))
    saved = outputs(config, params, document)
    parity("outputs", saved, golden["mid/et_outputs"])
    derivative = {**params, FROZEN: lm_params(config.lm.model, golden.under("params"), "derivative.")}
    read = jax.jit(lambda params, *parts: Extensible(config).apply({"params": params}, parts, method="read")[0])
    for k in golden.config["ks"]:
        index = document_indices(document.shape[1], config.session, k)
        np.testing.assert_array_equal(index, golden[f"mid/index_k{k}"])
        for name, own in (("lm", params), ("derivative", derivative)):
            logits = read(own, prefix, saved[:, index], tail)[0, -tail.shape[1] - 1 : -1]
            nats = cross_entropy(logits, tail[0])
            parity("logits", logits, golden[f"out/{name}_k{k}_logits"])
            parity("nats", nats, golden[f"out/{name}_k{k}_nll"])
            parity("perplexity", jnp.exp(nats.mean()), golden[f"out/{name}_k{k}_ppl"])
    logits = read(params, prefix, document, tail)[0, -tail.shape[1] - 1 : -1]
    parity("raw nats", cross_entropy(logits, tail[0]), golden["out/lm_raw_nll"])


@pytest.mark.parity("extensible/adamw*.npz")
def test_updates(golden, parity):
    """Steps of AdamW at lr (T - t) / T."""
    config, params = load(golden)
    before, steps = params[FROZEN], golden.config["steps"]
    settings = OptimizerConfig(
        learning_rate=golden.config["lr"],
        min_learning_rate=0.0,
        schedule="linear",
        warmup=0.0,
        b2=0.999,
        weight_decay=0.0,
    )
    optimizer = make_optimizer(settings)
    state, norms, losses, rates = optimizer.init(params), [], [], []

    @jax.jit
    def updated(params, state, gradient, step):
        updates, state = optimizer.update(gradient, state, params)
        rate = learning_rates(settings, step, steps)
        return optax.apply_updates(params, descend(updates, rate)), state, rate[""]

    for step, (ids, ks) in enumerate(zip(golden["in/ids"], golden["in/k"])):
        loss, gradient, _ = of_batch(config, params, ids, ks, golden.config["chunk"])
        norms.append(optax.global_norm(gradient["tokenizer"]))
        params, state, rate = updated(params, state, gradient, step)
        losses, rates = [*losses, loss], [*rates, rate]
    parity("losses", jnp.stack(losses), golden["out/losses"])
    parity("gradient norms", jnp.stack(norms), golden["out/grad_norms"], rtol=1e-3)
    parity("rates", jnp.stack(rates), golden["out/lrs"])
    ours = tokenizer_tensors(config, params["tokenizer"])
    theirs = {name: x for name, x in golden.under("out").items() if name.startswith("et.")}
    parity("parameters", {name: ours[name] for name in theirs}, theirs, rtol=1e-3)
    jax.tree.map(np.testing.assert_array_equal, params[FROZEN], before)
