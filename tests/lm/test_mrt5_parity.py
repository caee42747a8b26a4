"""MrT5 and its baselines against the numbers of the authors' code, for whatever sizes and options a file has."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.data.span_corruption import corrupt, raw_length
from jaxtok.interop.huggingface import params_from, params_to
from jaxtok.interop.t5 import read_config
from jaxtok.lm.mrt5 import (
    MrT5Training,
    compact,
    control,
    entropies,
    new_controller,
    regulariser,
    score_excess,
)
from jaxtok.lm.mrt5_baselines import boundary_loss, fixed_gate
from jaxtok.lm.t5 import shift_right, softmax1
from jaxtok.nn.attention import attend
from jaxtok.nn.losses import cross_entropy, masked_mean
from jaxtok.tokenizers import ByT5Tokenizer


def load(golden):
    tensors = golden.under("params")
    config = read_config(golden.config, tensors)
    return config, params_from(config, tensors)


def inputs(golden):
    names = ("input_ids", "attention_mask", "labels", "uniform_u")
    return {name: golden[f"in/{name}"] for name in names if f"in/{name}" in golden.arrays}


def nats(logits, labels):
    return masked_mean(cross_entropy(logits, jnp.maximum(labels, 0)), labels >= 0)


def apply_all(config, params, arrays, hard=False, capacity=0, threshold=None):
    """What is before the reduction, what the decoder gets, its logits, and everything that was sown."""
    noise = {"encoder": {"uniform": arrays["uniform_u"]}} if "uniform_u" in arrays else {}
    variables = {"params": params, "noise": noise}
    apply = functools.partial(config.module().apply, variables, mutable="intermediates")
    begun, first = apply(arrays["input_ids"], arrays["attention_mask"], threshold, method="begin")
    encoded, second = apply(begun, hard, capacity, method="finish")
    (logits, _), third = apply(shift_right(jnp.maximum(arrays["labels"], 0)), encoded, method="decode")
    blocks = [part["intermediates"]["encoder"].get(name) for part, name in ((first, "stack"), (second, "rest"))]
    hidden = [part["blocks"]["hidden"][0] for part in blocks if part]
    return begun, encoded, logits, hidden, {**second["intermediates"], **third["intermediates"]}


@functools.partial(jax.jit, static_argnames="config")
def soft(config, params, arrays, alpha):
    def loss(params):
        begun, encoded, logits, hidden, sown = apply_all(config, params, arrays)
        entropy = nats(logits, arrays["labels"])
        terms = ("gate_mean", "logits_mean", "clamped_logits_mean", "gate_var")
        totals = {name: entropy + alpha * regulariser(name, begun, config.threshold) for name in terms}
        scores = totals["gate_mean"] + 0.5 * score_excess(sown, begun.mask)
        return totals["gate_mean"], (begun, encoded.states, logits, hidden, entropy, totals, scores)

    return jax.value_and_grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames=("config", "capacity"))
def hard(config, params, arrays, capacity, threshold=None):
    begun, encoded, logits, *_ = apply_all(config, params, arrays, True, capacity, threshold)
    filled = compact(begun, capacity)[1] if capacity else None
    return begun, encoded.states, logits, nats(logits, arrays["labels"]), filled


GATES = ["mrt5/mrt5_softmax*.npz", "mrt5/mrt5_logsigmoid*.npz"]


@pytest.mark.parity(*GATES)
def test_soft_deletion(golden, parity):
    config, params = load(golden)
    arrays = inputs(golden)
    alpha = golden.config["alpha"]
    (_, (begun, states, logits, hidden, entropy, totals, scores)), gradient = soft(config, params, arrays, alpha)
    real, wanted = arrays["attention_mask"].astype(bool), arrays["labels"] >= 0
    parity("gate logits", begun.logits, golden["mid/soft_delete_gate_logits"][..., 0], rtol=1e-5)
    if real.all() or config.gate == "sigmoid":
        parity("gate", begun.gate, golden["mid/soft_delete_gate_values"][..., 0], rtol=1e-5)
    parity("soft logits", logits[wanted], golden["out/soft_logits"][wanted])
    parity("soft encoder", states[real], golden["out/soft_encoder_last_hidden_state"][real])
    for k, ours in enumerate([*hidden[0], *hidden[1]][:-1], 1):
        parity("soft hidden states", ours[real], golden[f"mid/soft_encoder_hidden_{k}"][real])
    parity("soft cross entropy", entropy, golden["out/soft_ce_loss"], rtol=2e-5)
    for name, total in totals.items():
        theirs = name if "logits" in name else f"{name}_loss"
        parity(f"loss with {name}", total, golden[f"out/soft_total_loss_{theirs}"], rtol=2e-5)
    parity("loss with scores", scores, golden["out/soft_total_loss_with_scores_beta0.5"], rtol=2e-5)
    rate = (np.asarray(begun.gate) < config.threshold)[real].mean()
    parity("deletion rate", rate, golden["out/deleted_fraction_nonpad"], rtol=1e-6)
    theirs = golden.under("grad")
    ours = params_to(config, gradient)
    parity("gradient", {name: ours[name] for name in theirs}, theirs, rtol=1e-3)


@pytest.mark.parity(*GATES)
def test_hard_deletion(golden, parity):
    """Deleted bytes are hidden, and taken out into as many positions as in the authors' code."""
    config, params = load(golden)
    arrays = inputs(golden)
    kept, counts = golden["mid/hard_keep"].astype(bool), golden["out/hard_new_lengths"]
    wanted, most = arrays["labels"] >= 0, int(counts.max())
    assert int(golden["out/hard_encoder_len"]) == most
    for capacity in (0, most):
        begun, states, logits, entropy, filled = hard(config, params, arrays, capacity)
        np.testing.assert_array_equal(begun.kept, kept & (arrays["attention_mask"] > 0))
        parity("hard logits", logits[wanted], golden["out/hard_logits"][wanted])
        parity("hard cross entropy", entropy, golden["out/hard_ce_loss"], rtol=2e-5)
        if capacity:
            filled = np.asarray(filled)
            theirs = golden["out/hard_encoder_last_hidden_state"]
            parity("hard encoder", states[:, :most][filled[:, :most]], theirs[filled[:, :most]])
            expected = golden["mid/hard_delete_gate_mask"][..., 0] == 0
            np.testing.assert_array_equal(filled[:, :most], expected)


@pytest.mark.parity("mrt5/mrt5_hard_edges*.npz")
def test_hard_edges(golden, parity):
    """A row without survivors keeps its position 0; no gradient of the cross entropy reaches the gate."""
    config, params = load(golden)
    arrays = inputs(golden)
    wanted, override = arrays["labels"] >= 0, golden.config["threshold_override"]
    most = golden["out/override_encoder_last_hidden_state"].shape[1]
    for capacity in (0, most):
        begun, states, logits, entropy, filled = hard(config, params, arrays, capacity, override)
        parity("gate", begun.gate, golden["mid/delete_gate_values"][..., 0], rtol=1e-5)
        np.testing.assert_array_equal(begun.kept, golden["mid/override_keep"].astype(bool))
        parity("override logits", logits[wanted], golden["out/override_logits"][wanted])
        parity("override cross entropy", entropy, golden["out/override_ce_loss"], rtol=2e-5)
    np.testing.assert_array_equal(np.asarray(filled), golden["mid/override_delete_gate_mask"][..., 0] == 0)
    parity("override encoder", states[filled], golden["out/override_encoder_last_hidden_state"][filled])

    @jax.jit
    def loss(params):
        begun, _, logits, *_ = apply_all(config, params, arrays, hard=True)
        entropy = nats(logits, arrays["labels"])
        return entropy + golden.config["alpha"] * regulariser("gate_mean", begun, config.threshold), (logits, begun)

    (total, (logits, begun)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_array_equal(begun.kept, golden["mid/hard_keep"].astype(bool))
    parity("hard logits", logits[wanted], golden["out/hard_logits"][wanted])
    parity("hard loss", total, golden["out/hard_total_loss_gate_mean_loss"], rtol=2e-5)
    theirs, ours = golden.under("grad"), params_to(config, gradient)
    parity("gradient", {name: ours[name] for name in theirs}, theirs, rtol=1e-3)


@pytest.mark.parity("mrt5/mrt5_generate*.npz")
def test_generation(golden):
    config, params = load(golden)
    task = MrT5Training(model=config)
    rows = [row[mask.astype(bool)].tolist() for row, mask in zip(golden["in/input_ids"], golden["in/attention_mask"])]
    for deletion in ("soft", "hard"):
        theirs = golden[f"out/{deletion}_greedy_ids"][:, 1:]
        new = task.generate(params, rows, max_new_tokens=theirs.shape[1], encoding={"deletion": deletion})
        np.testing.assert_array_equal([row + [0] * (theirs.shape[1] - len(row)) for row in new.tokens], theirs)


@pytest.mark.parity("mrt5/bp*.npz", "mrt5/cp*.npz")
def test_baselines(golden, parity):
    config, params = load(golden)
    arrays = inputs(golden)
    slots = golden["out/encoder_last_hidden_state"].shape[1]

    @functools.partial(jax.jit, static_argnames="capacity")
    def run(params, capacity):
        def loss(params):
            begun, encoded, logits, *_ = apply_all(config, params, arrays, capacity=capacity)
            entropy = nats(logits, arrays["labels"])
            extra = boundary_loss(begun, config.prior) if config.reduction == "boundaries" else 0.0
            return entropy + extra, (begun, encoded.states, logits, entropy, extra)

        return jax.value_and_grad(loss, has_aux=True)(params)

    wanted = arrays["labels"] >= 0
    for capacity in (0, slots) if config.reduction == "boundaries" else (0,):
        (_, (begun, states, logits, entropy, extra)), gradient = run(params, capacity)
        parity("logits", logits[wanted], golden["out/logits"][wanted])
        parity("cross entropy", entropy, golden["out/ce_loss"], rtol=2e-5)
        parity("encoder", states[:, :slots], golden["out/encoder_last_hidden_state"])
        if config.reduction == "boundaries":
            parity("boundary loss", extra, golden["out/boundary_loss"], rtol=2e-5)
            np.testing.assert_array_equal(begun.boundaries.round(), golden["out/hard_boundaries"])
        if theirs := golden.under("grad"):
            ours = params_to(config, gradient)
            parity("gradient", {name: ours[name] for name in theirs}, theirs, rtol=1e-3)


@pytest.mark.parity("mrt5/rules*.npz")
def test_rules(golden, parity):
    @jax.jit
    def trace(rates, settings):
        def step(state, rate):
            state = control(state, rate, settings[2], settings[0], settings[1])
            return state, state["alpha"]

        return jax.lax.scan(step, new_controller(), rates)[1]

    for j in range(sum(key.startswith("in/pi") and key.endswith("settings") for key in golden.arrays)):
        ours = trace(golden[f"in/pi{j}_deletion_rates"], golden[f"in/pi{j}_settings"])
        np.testing.assert_allclose(ours, golden[f"out/pi{j}_alpha_f64"], atol=1e-7, rtol=0)
    each, mean = jax.jit(entropies)(golden["in/entropy_log_gate"])
    parity("entropy of gates", each, golden["out/entropy_H1"], rtol=1e-5)
    parity("entropy of the mean gate", mean, golden["out/entropy_H2"], rtol=1e-5)
    scores = golden["in/softmax1_scores"]
    rows, keys = scores.shape
    # With queries and values that are unit vectors, what attention gives are its weights.
    zeros, values = np.zeros((rows, 1, 1, keys), np.float32), np.tile(np.eye(keys, dtype=np.float32), (rows, 1, 1))
    attention = jax.jit(functools.partial(attend, causal=False, softmax=softmax1))
    weights = attention(
        zeros, np.zeros((rows, keys, 1, keys), np.float32), values[:, :, None], bias=(scores[:, None, None],)
    )
    for ours, theirs in zip(np.asarray(weights)[:, 0, 0], golden["out/softmax1"]):
        parity("softmax1", ours, theirs, rtol=1e-5)
    for j in range(sum(key.startswith("in/fixed") and key.endswith("ids") for key in golden.arrays)):
        ids, amount = golden[f"in/fixed{j}_ids"], round(float(golden[f"in/fixed{j}_amount"]), 6)
        theirs = golden[f"out/fixed{j}_mask"]
        np.testing.assert_array_equal(fixed_gate(ids, ids > 0, amount, -30.0), theirs)


@pytest.mark.parity("mrt5/rules*.npz")
def test_span_corruption(golden):
    density, span = (round(float(x), 6) for x in golden["in/spancorr_settings"][1:])
    found = raw_length(int(golden["in/spancorr_settings"][0]), density, span)
    np.testing.assert_array_equal(found, golden["out/spancorr_tokens_and_targets_length"])
    for row in golden["out/spancorr_length_table"].astype(float).round(6):
        assert raw_length(int(row[0]), row[1], row[2]) == tuple(row[3:]), row
    first = golden.config["first_sentinel"]
    for row, (tokens, mask) in enumerate(zip(golden["in/spancorr_tokens"], golden["in/spancorr_noise_mask"])):
        made, targets = corrupt(tokens, mask, first, 1)
        np.testing.assert_array_equal(made, golden["out/spancorr_input_ids"][row])
        np.testing.assert_array_equal(targets, golden["out/spancorr_labels"][row])
        np.testing.assert_array_equal(shift_right(targets[None])[0], golden["out/spancorr_decoder_input_ids"][row])


@pytest.mark.parity("mrt5/byt5_tokenizer*.npz")
def test_tokenizer(golden):
    tokenizer = ByT5Tokenizer("ids")
    texts = golden.config["texts"]
    for number, text in enumerate(json.loads(texts) if isinstance(texts, str) else texts):
        assert tokenizer.encode_text(text) == golden[f"out/ids_{number}"].tolist()
    assert tokenizer.vocab_size == golden["out/len"]
    assert tokenizer.encode("<extra_id_0>") == [golden["out/extra_id_0"]]
