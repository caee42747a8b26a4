"""HAT against the paper's equations in float64 (variant P) and the authors' own modules (variant R)."""

from __future__ import annotations

import functools

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.decoding.sampling import Sampling
from jaxtok.interop.hat import params_from, params_to, read_config
from jaxtok.lm.hat import HAT, HATConfig, spell_on_prompts, spelled, split_words
from jaxtok.lm.hat_released import ReleasedHAT, generate_bytes
from jaxtok.nn.linear import LlamaStack
from jaxtok.nn.losses import cross_entropy
from jaxtok.tokenizers.words import WordSplitter

GROUPS = {"q": ("attention", "query"), "k": ("attention", "key"), "v": ("attention", "value")}
GROUPS |= {"o": ("attention", "output"), "gate": ("ffn", "gate"), "up": ("ffn", "up"), "down": ("ffn", "down")}
NORMS = {"attn_norm": "norm_attention", "mlp_norm": "norm_ffn"}


def paper_config(options, lengths) -> HATConfig:
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
        max_units=int(max(lengths)),
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
    """Logits of words 2 ... L and of the end after L, and everything on the way."""
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
    lengths = golden["in/word_lens"][None]
    config = paper_config(golden.config, lengths[0])
    params = paper_params(config, golden.under("params"))
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
    lens, data = golden["out/greedy_word_lens"], bytes(golden["out/greedy_bytes"].tolist())
    ends = np.cumsum(lens)
    words = [data[a:b] for a, b in zip([0, *ends], ends)]
    config = paper_config(golden.config, lens[2:])
    params = paper_params(config, golden.under("params"))
    (row,) = spell_on_prompts(config, params, [(words[:2], b"")], len(data), Sampling(temperature=0))
    new = [word for word in split_words(config, row.tokens) if word]
    assert new[: len(words) - 2] == words[2:]


def released(golden):
    config = read_config(golden.config)
    return config, params_from(config, golden.under("params"))


@functools.partial(jax.jit, static_argnums=0)
def released_forward(config, params, tokens, word, words):
    """Latents, the backbone's outputs, the last states and logits, of one text of the fixture."""
    model = ReleasedHAT(config)

    def run(method, *args, **options):
        return model.apply({"params": params}, *args, method=method, **options)

    states = run("encode", tokens)[0]
    latents = run("connect", states, word, words)
    outputs = run("backbone", latents)[0]
    logits, state = model.apply({"params": params}, tokens, word, words, mutable="intermediates")
    hidden = state["intermediates"]["decoder"]["blocks"]["block"]["hidden"][0][-1]
    return states, latents, outputs, model.bind({"params": params}).final_norm(hidden), logits


@pytest.mark.parity("hat/release*.npz")
def test_released(golden, parity):
    config, params = released(golden)
    count = len(golden.config["texts"])
    texts = [(golden[f"in/{number}_bytes"], golden[f"in/{number}_word_lens"]) for number in range(count)]
    length, most = max(len(tokens) for tokens, _ in texts), max(max(len(lengths) for _, lengths in texts) - 1, 1)
    tokens, word = np.zeros((count, length), np.int32), np.full((count, length), most, np.int32)
    for row, (text, lengths) in enumerate(texts):
        tokens[row, : len(text)] = text
        word[row, : len(text)] = np.repeat(np.arange(len(lengths)), lengths)
    words = np.tile(np.arange(most), (count, 1))
    results = released_forward(config, params, tokens, word, words)
    for number, (text, lengths) in enumerate(texts):
        states, latents, outputs, hidden, logits = (x[number] for x in results)
        n, closed = len(text), len(lengths) - 1
        parity("encoder", states[:n], golden[f"mid/{number}_encoder_hidden"])
        if closed:
            parity("latents", latents[:closed], golden[f"mid/{number}_word_latents"])
            parity("backbone", outputs[:closed], golden[f"mid/{number}_backbone_out"])
        parity("decoder", hidden[:n], golden[f"mid/{number}_decoder_hidden"])
        parity("logits", logits[:n], golden[f"out/{number}_logits"])
        if f"out/{number}_next_byte_ce" in golden.arrays:
            loss = cross_entropy(logits[: n - 1], text[1:]).mean()
            parity("loss", loss, golden[f"out/{number}_next_byte_ce"], rtol=1e-5)


@pytest.mark.parity("hat/release*.npz")
def test_released_generation(golden):
    config, params = released(golden)
    prompt, expected = bytes(golden["in/generate_prompt"].tolist()), bytes(golden["out/generate_greedy_bytes"].tolist())
    words = WordSplitter("unicode", config.max_word_size).split(prompt)
    [(new, words)] = generate_bytes(config, params, [words], len(expected) - len(prompt), Sampling(temperature=0))
    assert prompt + new.text == expected
    assert [len(word) for word in words] == golden["out/generate_word_lens"].tolist()


@pytest.mark.parity("hat/release*.npz")
def test_released_names(golden):
    config, params = released(golden)
    again = params_to(config, params)
    theirs = golden.under("params")
    assert again.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(again[name], theirs[name])
    with pytest.raises(ValueError, match=r"layer_norm.weight is missing; nonsense is unknown"):
        params_from(
            config,
            {"nonsense": theirs["layer_norm.weight"]} | {n: a for n, a in theirs.items() if n != "layer_norm.weight"},
        )
