"""GPT-2 and Llama-style decoders against Hugging Face's numbers, for whatever sizes and options a file has."""

from __future__ import annotations

import functools
import json

import causal_lms
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from jaxtok.decoding import Sampling, generate
from jaxtok.interop.huggingface import params_from, params_to, read_config, read_folder, rope_from_json
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.llama import LlamaConfig
from jaxtok.nn.losses import cross_entropy, masked_mean
from jaxtok.nn.rotary import rotary_frequencies

TASKS = {
    "gpt2": lambda: tiny.text(GPT2Config(**tiny.SIZES, mlp_dim=32)),
    "llama": lambda: tiny.text(LlamaConfig(**tiny.SIZES, num_kv_heads=2, mlp_dim=32, window=9)),
}

EVIDENCE = {"llama": {"formats": ("llama, a tokenizer.json", "mistral", "qwen2", "gemma")}}

CAUSAL_LMS = {
    "gpt2": lambda: Decoder(GPT2Config(**causal_lms.SIZES | {"rotary_fraction": 0.0}, mlp_dim=24)),
    "llama": lambda: Decoder(LlamaConfig(**causal_lms.LLAMA, num_kv_heads=2, mlp_dim=24)),
    "mistral": lambda: Decoder(LlamaConfig(**causal_lms.LLAMA, mlp_dim=24, window=16)),
}

DECODERS = [f"llama_gpt2_bricks/{kind}*.npz" for kind in ("gpt2", "llama", "qwen2", "mistral", "gemma")]


def load(golden):
    config = read_config(golden.config)
    return config, params_from(config, golden.under("params"))


@functools.partial(jax.jit, static_argnames="config")
def apply(config, params, tokens, **kwargs):
    return Decoder(config).apply({"params": params}, tokens, **kwargs)


@functools.partial(jax.jit, static_argnames="config")
def run(config, params, tokens, labels):
    """Loss, gradients, logits and hidden states: the embedding, after each block but the last, after the norm."""

    def loss(params):
        model = Decoder(config)
        (logits, _), state = model.apply({"params": params}, tokens, mutable="intermediates")
        blocks = state["intermediates"]["stack"]["blocks"]["hidden"][0]
        last, _ = model.apply(
            {"params": params}, model.apply({"params": params}, tokens, method="embed"), method="hidden"
        )
        nats = cross_entropy(logits[:, :-1], jnp.maximum(labels[:, 1:], 0))
        return masked_mean(nats, labels[:, 1:] >= 0), (logits, [*blocks[:-1], last])

    (loss, (logits, hidden)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return loss, gradient, logits, hidden


@pytest.mark.parity(*DECODERS)
def test_model(golden, parity):
    config, params = load(golden)
    loss, gradient, logits, hidden = run(config, params, golden["in/input_ids"], golden["in/labels"])
    parity("logits", logits, golden["out/logits"])
    parity("loss", loss, golden["out/loss"], rtol=1e-5)
    for k, ours in enumerate(hidden, 1):
        parity("hidden states", ours, golden[f"mid/hidden_{k}"])
    theirs = golden.under("grad")
    ours = params_to(config, gradient)
    for name in theirs:
        rtol = 1e-3
        if name.endswith("c_attn.bias"):  # the middle third is 0 but for rounding: softmax does not see it
            ours[name] = ours[name].reshape(3, -1)[[0, 2]]
            theirs[name] = theirs[name].reshape(3, -1)[[0, 2]]
        parity("gradient", ours[name], theirs[name], rtol=rtol)
    assert ours.keys() == theirs.keys()


@pytest.mark.parity(*DECODERS)
def test_cached_decoding(golden, parity):
    config, params = load(golden)
    tokens, prefill = golden["in/input_ids"], int(golden["in/prefill_len"])
    logits, cache = apply(config, params, tokens[:, :prefill], cache=Decoder(config).init_cache(*tokens.shape))
    parts, done = [logits], prefill
    for new in [2] + [1] * (tokens.shape[1] - prefill - 2):
        logits, cache = apply(config, params, tokens[:, done : done + new], cache=cache)
        parts, done = [*parts, logits], done + new
    parity("cached logits", jnp.concatenate(parts, 1), golden["out/cached_logits"])
    kept = golden["out/cache_k"].shape[3]  # a window keeps the last ones only
    parity("cached keys", cache.keys.swapaxes(2, 3)[:, :, :, -kept:], golden["out/cache_k"])
    parity("cached values", cache.values.swapaxes(2, 3)[:, :, :, -kept:], golden["out/cache_v"])


@pytest.mark.parity(*DECODERS)
def test_left_padded_rows(golden, parity):
    """Rows of a padded batch have their own lengths here, without the padding, and the same numbers."""
    config, params = load(golden)
    if "in/pad_input_ids" not in golden.arrays:
        pytest.skip("the fixture has no padded batch")
    mask, ids = golden["in/pad_attention_mask"], golden["in/pad_input_ids"]
    lengths = mask.sum(1)
    rows = [row[-n:] for row, n in zip(ids, lengths)]
    right = np.zeros_like(ids)
    for row, text in zip(right, rows):
        row[: len(text)] = text
    following = golden["in/pad_next_ids"]
    cache = Decoder(config).init_cache(len(rows), ids.shape[1] + following.shape[1])
    logits, cache = apply(config, params, right, cache=cache)
    theirs = golden["out/pad_logits"]
    parity("padded logits", np.concatenate([a[:n] for a, n in zip(logits, lengths)]), theirs[mask.astype(bool)])
    logits, cache = apply(config, params, following, cache=cache.truncate(jnp.asarray(lengths)))
    parity("logits after padded rows", logits, golden["out/pad_next_logits"])

    stop = golden["in/gen_eos_token_id"].tolist()
    pad, count = int(golden["in/gen_pad_token_id"]), int(golden["in/gen_max_new_tokens"])
    for name, stops in (("out/gen_ids", stop), ("out/gen_ids_no_eos", [])):
        new = generate(
            Decoder(config),
            params,
            [row.tolist() for row in rows],
            max_new_tokens=count,
            chooser=Sampling(temperature=0),
            stop_tokens=stops,
        )
        theirs = golden[name][:, ids.shape[1] :]
        ours = np.array([row + [pad] * (count - len(row)) for row in new.tokens])[:, : theirs.shape[1]]
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parity("llama_gpt2_bricks/rope*.npz")
def test_rope_variants(golden, parity):
    for name, case in golden.config.items():
        options, positions = case["config"], np.asarray(case["positions"])
        length = options.get("max_position_embeddings", 2048)
        dim = options["hidden_size"] // options["num_attention_heads"]
        base, scaling = rope_from_json(options, dim, length)
        if scaling and scaling.kind in ("dynamic", "longrope"):  # theirs takes the length from the call
            scaling = scaling.__class__(**{**vars(scaling), "length": int(positions.max()) + 1})
        frequency, factor = rotary_frequencies(dim, base, scaling)
        out = golden.under(f"out/{name}")
        parity(f"{name} frequencies", frequency, out["inv_freq"], rtol=1e-6)
        assert factor == pytest.approx(float(out["attention_factor"]), rel=1e-6)
        angle = positions[:, None].astype(np.float32) * np.tile(frequency, 2)
        rtol = 1e-2 if positions.max() > 1e4 else 1e-5
        parity(f"{name} cos", factor * np.cos(angle), out["cos"], rtol=rtol)
        parity(f"{name} sin", factor * np.sin(angle), out["sin"], rtol=rtol)


@pytest.mark.parity("llama_gpt2_bricks/hf_folder_llama_expected.npz")
def test_folder(golden, parity, request):
    folder = request.config.getoption("--goldens") / "llama_gpt2_bricks" / "hf_folder_llama"
    config, params = read_folder(folder)
    ids = json.loads(str(golden["out/ids"]))
    for k in range(4):
        parity(f"logits of text {k}", apply(config, params, np.array([ids[k]]))[0][0], golden[f"out/logits_{k}"])
    stops = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    rows = [ids[k] for k in golden["in/gen_rows"]]
    new = generate(Decoder(config), params, rows, max_new_tokens=12, chooser=Sampling(temperature=0), stop_tokens=stops)
    width = golden["out/gen_ids"].shape[1] - 12
    for row, expected in zip(new.tokens, golden["out/gen_ids"][:, width:]):
        assert row == expected[: len(row)].tolist()
