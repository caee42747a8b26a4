"""Hugging Face folders: what is read is written, and what cannot be read is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import jaxtok
from jaxtok.interop.folders import read_options
from jaxtok.interop.huggingface import (
    config_json,
    is_folder,
    params_to,
    read_config,
    read_folder,
    write_folder,
)
from jaxtok.interop.texts import read_texts
from jaxtok.lm import gpt2, llama
from jaxtok.lm.decoder import Decoder, init_params
from jaxtok.nn.rotary import RopeScaling, rotary_frequencies
from jaxtok.verbs import evaluate, generate
from jaxtok.verbs.convert import convert

FOLDER = Path(__file__).parents[1] / "goldens" / "llama_gpt2_bricks" / "hf_folder_llama"
TINY = {"num_layers": 2, "d_model": 16, "num_heads": 4, "mlp_dim": 24, "vocab_size": 40, "max_length": 32}
LLAMA = llama.LlamaConfig(**TINY, num_kv_heads=2)
CONFIGS = {
    "gpt2": gpt2.GPT2Config(**TINY, norm_eps=1e-5, scale_by_layer=True),
    "gpt2, own head": gpt2.GPT2Config(**TINY, norm_eps=1e-5, tie_embeddings=False, activation="relu"),
    "llama": dataclasses.replace(LLAMA, use_bias=True, mlp_bias=True),
    "llama, wide heads": dataclasses.replace(LLAMA, head_size=6, tie_embeddings=True),
    "llama 3": dataclasses.replace(
        LLAMA, rotary_scaling=RopeScaling(kind="llama3", factor=8.0, original_length=16, length=32)
    ),
    "mistral": dataclasses.replace(LLAMA, window=7),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True, window=5, full_layers=(0,), norm_eps=1e-6),
    "gemma": dataclasses.replace(
        LLAMA,
        num_kv_heads=1,
        head_size=8,
        norm="rms_plus_one",
        activation="gelu_tanh",
        tie_embeddings=True,
        scale_embeddings=True,
    ),
}


def random_params(config, seed=0):
    params = jax.eval_shape(lambda: init_params(Decoder(config), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(x.dtype), params)


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
@pytest.mark.parametrize("name", CONFIGS)
def test_written_then_read_is_the_same(name, shard_bytes, tmp_path):
    config, params = CONFIGS[name], random_params(CONFIGS[name])
    write_folder(tmp_path / "folder", config, params, shard_bytes=shard_bytes)
    assert is_folder(tmp_path / "folder")
    again, tree = read_folder(tmp_path / "folder")
    for field in dataclasses.fields(config):
        ours, theirs = getattr(config, field.name), getattr(again, field.name)
        if field.name in ("head_size", "num_kv_heads", "qkv_bias", "mlp_bias", "use_bias"):
            continue  # stated in another way
        assert ours == theirs, field.name
    assert (again.head_dim, again.kv_heads) == (config.head_dim, config.kv_heads)
    assert jax.tree.structure(tree) == jax.tree.structure(params)
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, params))


def test_with_the_library_itself(tmp_path):
    """Models of random weights, made by `transformers`, have the same logits here, and it reads what we write."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    for name, config in CONFIGS.items():
        params = random_params(config)
        params = jax.tree.map(lambda x: 0.3 * x, params)
        folder = write_folder(tmp_path / name.replace(" ", "_").replace(",", ""), config, params)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, 20))
        with torch.no_grad():
            expected = theirs(torch.from_numpy(tokens)).logits.numpy()
        ours, _ = jax.jit(Decoder(config).apply)({"params": params}, tokens)
        np.testing.assert_allclose(ours, expected, atol=1e-4 * np.abs(expected).max(), err_msg=name)


@pytest.mark.parametrize(
    ("published", "parameters"),
    [
        (gpt2.PUBLISHED["gpt2"], 124_439_808),
        (gpt2.PUBLISHED["gpt2-medium"], 354_823_168),
        (gpt2.PUBLISHED["gpt2-large"], 774_030_080),
        (gpt2.PUBLISHED["gpt2-xl"], 1_557_611_200),
        (llama.PUBLISHED["llama-2-7b"], 6_738_415_616),
        (llama.PUBLISHED["llama-2-13b"], 13_015_864_320),
        (llama.PUBLISHED["llama-2-70b"], 68_976_648_192),
        (llama.PUBLISHED["llama-3-8b"], 8_030_261_248),
        (llama.PUBLISHED["llama-3-70b"], 70_553_706_496),
        (llama.PUBLISHED["llama-3.2-1b"], 1_235_814_400),
        (llama.PUBLISHED["llama-3.2-3b"], 3_212_749_824),
        (llama.PUBLISHED["mistral-7b-v0.1"], 7_241_732_096),
        (llama.PUBLISHED["qwen2.5-0.5b"], 494_032_768),
        (llama.PUBLISHED["qwen2.5-1.5b"], 1_543_714_304),
        (llama.PUBLISHED["qwen2.5-7b"], 7_615_616_512),
        (llama.PUBLISHED["gemma-2b"], 2_506_172_416),
    ],
)
def test_published_sizes(published, parameters):
    shapes = jax.eval_shape(lambda: init_params(Decoder(published), jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    assert sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes)) == parameters
    assert read_config(config_json(published)).num_layers == published.num_layers


def test_texts_of_a_folder(capfdbinary, tmp_path):
    opened = jaxtok.open(FOLDER)
    assert opened.begin == (380,) and opened.ends == (381, 383)
    expected = np.load(FOLDER.parent / "hf_folder_llama_expected.npz")
    texts, ids = (json.loads(str(expected[name])) for name in ("texts", "out/ids"))
    for text, theirs in zip(texts, ids):
        assert opened.ids(text).tolist() == theirs
        assert opened.tokenizer.decode(opened.tokenizer.encode(text)) == text.encode()
    (text,) = generate(FOLDER, prompt=("hello",), temperature=0, max_new_tokens=5)
    assert capfdbinary.readouterr().out == b"hello" + text + b"\n"
    corpus = tmp_path / "a.txt"
    corpus.write_text("some words, and then some more")
    assert evaluate(FOLDER, corpus=str(corpus), split="all")["bits_per_byte"] > 1


def test_folder_to_run_and_back(tmp_path):
    convert(FOLDER, tmp_path / "run")
    convert(tmp_path / "run", tmp_path / "back")
    config, params = read_folder(FOLDER)
    again, tree = read_folder(tmp_path / "back")
    assert again.rotary_scaling == config.rotary_scaling
    assert jax.tree.all(jax.tree.map(np.array_equal, tree, params))
    assert (tmp_path / "back" / "tokenizer.json").is_file()


def test_a_head_that_is_the_embedding_is_found_in_the_tensors(tmp_path):
    """This holds whatever config.json has."""
    config = dataclasses.replace(LLAMA, tie_embeddings=True)
    folder = write_folder(tmp_path / "f", config, random_params(config))
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    options = json.loads((folder / "config.json").read_text())

    def saved(**changed):
        safetensors.numpy.save_file(changed, folder / "model.safetensors")
        return read_folder(folder)[0].tie_embeddings

    embedding = tensors["model.embed_tokens.weight"]
    assert saved(**tensors, **{"lm_head.weight": embedding})
    assert not saved(**tensors, **{"lm_head.weight": embedding + 1})
    rest = {name: x for name, x in tensors.items() if name != "model.embed_tokens.weight"}
    assert saved(**rest, **{"lm_head.weight": embedding})
    (folder / "config.json").write_text(json.dumps(options | {"tie_word_embeddings": False}))
    with pytest.raises(ValueError, match=r"no tensor lm_head\.weight"):
        saved(**tensors)


def test_names_without_the_models_prefix(tmp_path):
    config = CONFIGS["gpt2"]
    folder = write_folder(tmp_path / "f", config, random_params(config))
    tensors = {name.removeprefix("transformer."): x for name, x in params_to(config, random_params(config)).items()}
    tensors["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)  # a causal mask that old files have
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    assert jax.tree.all(jax.tree.map(np.array_equal, read_folder(folder)[1], random_params(config)))


@pytest.fixture
def broken(tmp_path):
    """A copy of the folder, to be damaged."""
    shutil.copytree(FOLDER, tmp_path / "broken")
    for path in (tmp_path / "broken").iterdir():
        path.chmod(0o644)
    return tmp_path / "broken"


def with_options(folder, **changed):
    options = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(options | changed))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "rwkv"}, "model_type is 'rwkv'; it must be one of gpt2, llama"),
        ({"hidden_act": "mish"}, "the activation is 'mish'"),
        ({"rope_scaling": {"rope_type": "odd"}}, "rope_type is 'odd'; it must be one of default, linear"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "needs low_freq_factor, high_freq_factor"),
        ({"num_key_value_heads": 3}, "num_kv_heads is 3, which does not divide num_heads = 4"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"intermediate_size": 57}, r"mlp\.gate_proj\.weight has shape \(56, 32\)"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.\S+ is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ is unknown"),
        ({"hidden_size": "32"}, r"hidden_size is '32' in \S+config\.json; it must be a whole number\."),
        ({"num_hidden_layers": 2.5}, r"num_hidden_layers is 2\.5 in \S+config\.json; it must be a whole number\."),
        ({"num_attention_heads": 0}, r"config\.json cannot be used \(ZeroDivisionError"),
        ({"rms_norm_eps": "small"}, r"rms_norm_eps is 'small' in \S+config\.json; it must be a number\."),
        ({"rope_scaling": "linear"}, r"rope_scaling is 'linear' in \S+config\.json; it must be a table"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "x"}}, r"config\.json cannot be used \(could not conv"),
        ({"tie_word_embeddings": "yes"}, r"tie_word_embeddings is 'yes' in \S+config\.json; it must be true or false"),
        ({"hidden_act": ["silu"]}, r"config\.json cannot be used \(TypeError: unhashable"),
    ],
)
def test_options_that_do_not_fit(broken, options, message):
    with_options(broken, **options)
    with pytest.raises(ValueError, match=message):
        read_folder(broken)


def test_files_that_are_missing_or_damaged(broken, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        read_folder(tmp_path)
    shard = broken / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:1000])
    with pytest.raises(ValueError, match="damaged or not a safetensors file"):
        read_folder(broken)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002\.safetensors does not exist, but .* names it"):
        read_folder(broken)
    shard.write_bytes(content)
    index = broken / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"]["model.extra.weight"] = shard.name
    index.write_text(json.dumps(places))
    with pytest.raises(ValueError, match=r"has no tensor model\.extra\.weight"):
        read_folder(broken)
    index.unlink()
    for path in broken.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        read_folder(broken)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json"):
        read_texts(broken, read_options(broken))


def test_a_factor_of_one_changes_no_frequency():
    plain, _ = rotary_frequencies(16, 10000.0)
    for kind in ("linear", "dynamic", "llama3", "yarn"):
        scaling = RopeScaling(kind=kind, factor=1.0, original_length=64, length=64)
        frequency, factor = rotary_frequencies(16, 10000.0, scaling)
        np.testing.assert_allclose(frequency, plain, rtol=1e-6)
        assert factor == 1.0
    with pytest.raises(ValueError, match="rope kind is 'odd'"):
        RopeScaling(kind="odd")
    with pytest.raises(ValueError, match="original_length is 0; for rope"):
        RopeScaling(kind="yarn", factor=2.0)


def test_a_window_hides_what_is_further_back():
    config = dataclasses.replace(LLAMA, num_layers=1, window=5)
    params, tokens = random_params(config), np.arange(20)[None] % config.vocab_size
    run = jax.jit(lambda tokens: Decoder(config).apply({"params": params}, tokens)[0])
    before = run(tokens)
    tokens[0, 3] += 1
    changed = np.abs(run(tokens) - before).max((0, 2)) > 0
    assert changed[3:8].all() and not changed[8:].any() and not changed[:3].any()


def test_grouped_queries_equal_repeated_keys():
    params = random_params(LLAMA)
    wide = dataclasses.replace(LLAMA, num_kv_heads=4)

    def repeat(path, x):
        if len(path) > 1 and path[-2].key in ("key", "value"):
            heads = x.reshape(*x.shape[:-1], 2, 4)
            return np.repeat(heads, 2, axis=-2).reshape(*x.shape[:-1], 16)
        return x

    tokens = np.arange(12)[None]
    a, _ = jax.jit(Decoder(LLAMA).apply)({"params": params}, tokens)
    b, _ = jax.jit(Decoder(wide).apply)({"params": jax.tree_util.tree_map_with_path(repeat, params)}, tokens)
    np.testing.assert_allclose(a, b, atol=1e-4)
