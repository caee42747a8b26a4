"""M2R2 against an independent float64 implementation of the same reconstruction; see `tests/goldens/m2r2/README.md`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.decoding import Sampling, generate
from jaxtok.decoding.expert_prefetch import simulate_expert_prefetch
from jaxtok.decoding.m2r2 import M2R2Config, SelfSpeculation, forward_two_streams, logits_of, route
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.nn.lora import flat, nested
from jaxtok.protocols import FROZEN
from jaxtok.transfer.m2r2 import M2R2

ADAPTER = ("attn_down", "attn_up", "mlp_down", "mlp_up", "norm")
BLOCK = {
    "attention/query/kernel": "q",
    "attention/key/kernel": "k",
    "attention/value/kernel": "v",
    "attention/output/kernel": "o",
    "ffn/gate/kernel": "gate",
    "ffn/up/kernel": "up",
    "ffn/down/kernel": "down",
    "norm_attention/scale": "norm1",
    "norm_ffn/scale": "norm2",
}


def stacked(arrays, folder, names, count):
    return {ours: np.stack([arrays[f"{folder}{i}/{theirs}"] for i in range(count)]) for ours, theirs in names.items()}


def case(golden):
    size, theirs = golden.config["model"], golden.under("params")
    model = LlamaConfig(
        num_layers=size["layers"],
        d_model=size["width"],
        num_heads=size["heads"],
        mlp_dim=size["ffn"],
        vocab_size=size["vocab"],
        max_length=64,
        norm_eps=golden.config["rms_eps"],
        rotary_base=golden.config["rope_theta"],
    )
    blocks = stacked(theirs, "layer", BLOCK, size["layers"])
    base = {
        "embedding": theirs["embed"],
        "head_matrix": theirs["lm_head"].T,
        "final_norm/scale": theirs["final_norm"],
        **{f"stack/blocks/{name}": array for name, array in blocks.items()},
    }
    config = M2R2Config(gates=tuple(size["gates"]), rank=size["rank"], latent=size["latent"], gamma=size["gamma"])
    exits = {
        "adapters": stacked(theirs, "adapter", dict(zip(ADAPTER, ADAPTER)), config.gates[-1]),
        "router": {name.removeprefix("router/"): x for name, x in theirs.items() if name.startswith("router/")},
    }
    return config, Decoder(model), jax.tree.map(jnp.asarray, nested(base)), jax.tree.map(jnp.asarray, exits)


@pytest.mark.parity("m2r2/reconstruction*.npz")
def test_streams_losses_and_gradients(golden, parity):
    config, model, base, exits = case(golden)
    ids = jnp.asarray(golden["in/ids"])

    @jax.jit
    def run(base, exits):
        out, _ = forward_two_streams(config, model, base, exits, ids)
        final = model.apply({"params": base}, out.final, method="head")
        logits = [logits_of(model, base, exit.state) for exit in out.exits]
        routed = [route(config, exits["router"], exit, gate) for gate, exit in enumerate(out.exits)]
        return out, final, logits, routed

    out, final, logits, routed = run(base, exits)
    for exit, end in zip(out.exits, config.gates, strict=True):
        parity("slow", exit.slow, golden["mid/slow"][end], rtol=1e-5)
    fast = jnp.concatenate([exit.trail for exit in out.exits])
    theirs = np.stack([golden[f"mid/accelerated_{i + 1}"] for i in range(len(fast))])
    parity("accelerated", fast, theirs, rtol=1e-5)
    parity("final logits", final, golden["out/final_logits"], rtol=1e-5)
    for gate, end in enumerate(config.gates):
        parity("exit logits", logits[gate], golden[f"out/exit_logits_{end}"], rtol=1e-5)
        parity("router", routed[gate], golden[f"out/exit_router_logit_{end}"], rtol=1e-5)

    ones = jnp.ones(ids.shape)
    batch = {"tokens": ids, "targets": ids, "mask": ones, "bytes": ones}
    batch |= {"positions": jnp.arange(ids.shape[1])[None] * jnp.ones_like(ids), "segments": jnp.ones_like(ids)}
    params = {FROZEN: base, "exits": exits}

    def loss_of(params, **options):
        task = M2R2(task=LanguageModeling(model=model.config), config=config, **options)
        return task.loss(params, batch, jax.random.key(0), jnp.asarray(1))[0]

    def loss(**options):
        value, gradient = jax.jit(jax.value_and_grad(functools.partial(loss_of, **options)))(params)
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient[FROZEN]))
        return value, gradient["exits"]

    value, gradient = loss()
    parity("distillation", value, golden["out/loss_distill_kl"], rtol=1e-6)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["router"]))
    theirs = stacked(golden.under("grad/distill"), "adapter", dict(zip(ADAPTER, ADAPTER)), config.gates[-1])
    for layer in range(config.gates[-1]):
        ours = {name: x[layer] for name, x in gradient["adapters"].items()}
        parity("distillation gradient", ours, {name: x[layer] for name, x in theirs.items()}, rtol=1e-5)
    hard = jax.jit(functools.partial(loss_of, target="argmax"))(params)
    parity("hard labels", hard, golden["out/loss_ce_hard"], rtol=1e-6)
    value, gradient = loss(train="router")
    parity("router loss", value, golden["out/loss_router_bce"], rtol=1e-6)
    parity("router gradient", flat(gradient["router"]), golden.under("grad/router/router"), rtol=1e-5)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["adapters"]))


@pytest.mark.slow
@pytest.mark.parity("m2r2/reconstruction*.npz")
def test_greedy_text_and_accepted_lengths(golden):
    config, model, base, exits = case(golden)
    ids, lengths = golden["out/greedy_ids"], golden["out/spec_accept_lengths"]
    new = ids.shape[1] - 4
    # The last round may run past the text.
    options = {"max_new_tokens": new + config.gamma, "chooser": Sampling(temperature=0)}
    found = generate(
        model, base, ids[:, :4].tolist(), drafter=SelfSpeculation(config=config), drafter_state=exits, **options
    )
    plain = generate(model, base, ids[:, :4].tolist(), **options)
    assert found.tokens == plain.tokens
    np.testing.assert_array_equal([row[:new] for row in found.tokens], ids[:, 4:])
    for row in range(len(ids)):
        theirs = [length for length in lengths[row].tolist() if length]
        text = [ids[row, 3], *found.tokens[row]]
        ours, at = [], 0
        while sum(ours) < new:  # from each round's start, its own acceptance
            ours.append(accepted(config, model, base, exits, [*ids[row, :4], *found.tokens[row][:at]]))
            at += ours[-1]
        assert ours == theirs, text


def accepted(config, model, base, exits, prompt):
    """The tokens of the first round after a prompt."""
    engine = engine_of(config, model)
    state = engine.prefill(base, jnp.asarray([prompt]), jnp.array([len(prompt)]), new=config.gamma + 1, drafter=exits)
    return int(engine.step(base, state).length[0]) - len(prompt)


def engine_of(config, model):
    from jaxtok.decoding import CachedTokens, Engine

    return Engine(model=CachedTokens(model), chooser=Sampling(temperature=0), drafter=SelfSpeculation(config=config))


@pytest.mark.parity("m2r2/expert_prefetch*.npz")
def test_expert_prefetch(golden):
    size = golden.config
    required, ahead = golden["in/required"], golden["in/predicted"]
    for mode, predicted in (("demand", None), ("ahead", ahead), ("oracle", required)):
        found = simulate_expert_prefetch(
            required,
            predicted,
            capacity=size["cache_per_layer"],
            t_load=size["t_load"],
            t_compute=size["t_compute"],
            lead=size["lead"],
            experts=size["experts"],
        )
        assert (found.hits, found.misses) == (golden[f"out/{mode}/hits"], golden[f"out/{mode}/misses"])
        np.testing.assert_allclose(found.stall, golden[f"out/{mode}/stall"], rtol=0, atol=1e-12)
        np.testing.assert_allclose(found.total_time, golden[f"out/{mode}/total_time"], rtol=0, atol=1e-12)
