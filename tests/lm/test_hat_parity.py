"""HAT against the paper's equations in float64 (variant P) and the authors' own modules (variant R)."""

from __future__ import annotations

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.decoding.sampling import Sampling
from jaxtok.lm.hat import HAT, HATConfig, LlamaStack, generate_words, spelled
from jaxtok.nn.losses import cross_entropy

GROUPS = {"q": ("attention", "query"), "k": ("attention", "key"), "v": ("attention", "value")}
GROUPS |= {"o": ("attention", "output"), "gate": ("ffn", "gate"), "up": ("ffn", "up"), "down": ("ffn", "down")}
NORMS = {"attn_norm": "norm_attention", "mlp_norm": "norm_ffn"}


def paper_config(options) -> HATConfig:
    def stack(part, which, **more):
        width, heads, ff = (options[f"{part}_{name}"] for name in ("dim", "heads", "ff"))
        sizes = {"num_layers": options[f"{which}_layers"], "d_model": width, "num_heads": heads, "mlp_dim": ff}
        return LlamaStack(**sizes, norm_eps=options["rms_eps"], rotary_base=options["rope_theta"], **more)

    return HATConfig(
        encoder=stack("char", "enc", causal=False),
        backbone=stack("backbone", "backbone"),
        decoder=stack("char", "dec"),
        w_id=options["w_id"],
        s_id=options["s_id"],
        max_units=options.get("max_units", 12),
        start=False,
    )


def paper_names(config: HATConfig) -> dict[str, list[tuple[tuple[str, ...], int | None]]]:
    """The fixtures' names to our paths and layers; all matrices there are [out, in]."""
    names = {"char_embed": [(("embedding",), None)], "head": [(("head_matrix",), None)]}
    names |= {"W_E": [(("word_in", "kernel"), None)], "W_D": [(("word_out", "kernel"), None)]}
    for part, ours in {"encoder": "encoder", "backbone": "backbone_stack", "decoder": "decoder"}.items():
        names[f"{part}.norm"] = [((f"{part}_norm", "scale"), None)]
        for layer in range(getattr(config, part).num_layers):
            for name, path in GROUPS.items():
                names[f"{part}.{layer}.{name}"] = [((ours, "blocks", *path, "kernel"), layer)]
            for name, path in NORMS.items():
                names[f"{part}.{layer}.{name}"] = [((ours, "blocks", path, "scale"), layer)]
    return names


def paper_params(config, arrays):
    flat: dict[tuple[str, ...], list] = {}
    for name, [(path, layer)] in paper_names(config).items():
        array = arrays[name].T if path[-1] == "kernel" else arrays[name]
        flat.setdefault(path, []).append(array)
        if layer is None:
            flat[path] = array
    flat = {path: np.stack(a) if isinstance(a, list) else a for path, a in flat.items()}
    return flax.traverse_util.unflatten_dict(flat)


def words_of(data, lengths, units):
    rows = np.zeros((1, len(lengths), units), np.int32)
    for row, word in zip(rows[0], np.split(data, np.cumsum(lengths)[:-1])):
        row[: len(word)] = word
    return rows


@functools.partial(jax.jit, static_argnums=0)
def paper_forward(config, params, words, lengths):
    """Logits of words 2 ... L and of the end behind L, and everything on the way."""
    model = HAT(config)

    def run(method, *args):
        return model.apply({"params": params}, *args, method=method)

    vectors = run("encode", words, lengths)
    outputs, _ = run("backbone", vectors)
    predictive = run("predictive", outputs)
    targets = jnp.pad(words[:, 1:], ((0, 0), (0, 1), (0, 0)))
    logits = model.apply({"params": params}, words, lengths, targets)
    ids, real = spelled(config, targets, jnp.pad(lengths[:, 1:], ((0, 0), (0, 1))))
    nats = cross_entropy(logits, ids)
    return jnp.sum(nats * real) / real.sum(), (vectors, outputs, predictive, logits, ids, real, nats)


@pytest.mark.parity("hat/paper*.npz")
def test_paper(golden, parity):
    config = paper_config(golden.config)
    params = paper_params(config, golden.under("params"))
    lengths = golden["in/word_lens"][None]
    words = words_of(golden["in/bytes"], lengths[0], config.max_units)
    grad = jax.jit(jax.value_and_grad(paper_forward, 1, has_aux=True), static_argnums=0)
    (loss, parts), gradient = grad(config, params, words, lengths)
    vectors, outputs, predictive, logits, ids, real, nats = (np.array(part[0]) for part in parts)
    parity("word embeddings", vectors, golden["mid/word_embeddings"])
    parity("backbone", outputs, golden["mid/backbone_out"])
    parity("predictive embeddings", predictive, golden["mid/predictive_embeddings"])
    np.testing.assert_array_equal(ids[real], golden["out/targets"])
    np.testing.assert_array_equal(np.nonzero(real)[0] + 1, golden["out/target_word"])
    parity("logits", logits[real], golden["out/logits"])
    parity("nats", nats[real], golden["out/nll"])
    parity("loss", loss, golden["out/loss_f64"], rtol=1e-5)
    right = np.all((logits.argmax(-1) == ids) | ~real, axis=1)
    np.testing.assert_array_equal(right, golden["out/word_correct_incl_terminator"])

    flat = flax.traverse_util.flatten_dict(gradient)
    names = golden.config["fd_param_names"] if "fd_param_names" in golden.config else list(golden.under("params"))
    found = []
    for number, index in golden["grad/fd_index"]:
        [(path, layer)] = paper_names(config)[names[number]]
        array = flat[path] if layer is None else flat[path][layer]
        found.append(np.asarray(array.T if path[-1] == "kernel" else array).reshape(-1)[index])
    theirs = golden["grad/fd_value_f64"]
    np.testing.assert_allclose(found, theirs, rtol=1e-4, atol=1e-6)
    parity("gradient", np.array(found), theirs, rtol=1e-4)


@pytest.mark.parity("hat/paper*.npz")
def test_paper_generation(golden, parity):
    config = paper_config(golden.config)
    params = paper_params(config, golden.under("params"))
    lens, data = golden["out/greedy_word_lens"], bytes(golden["out/greedy_bytes"].tolist())
    ends = np.cumsum(lens)
    words = [data[a:b] for a, b in zip([0, *ends], ends)]
    config = HATConfig(**{**vars(config), "max_units": 6})
    new = generate_words(config, params, [(words[:2], b"")], len(data), Sampling(temperature=0))[0]
    assert new[: len(words) - 2] == words[2:]
