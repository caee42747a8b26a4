"""GGUF files: what is read is what was written, for each architecture and tokenizer, by the verbs that a user types."""

from __future__ import annotations

import dataclasses
import json
import unicodedata

import gguf
import jax
import numpy as np
import pytest
from gguf.quants import _type_traits as QUANTIZED
from gguf_files import (
    TEMPLATE,
    byte_level,
    sentence_fields,
    sentences,
    texts,
    tokenizer_fields,
    write_gguf,
)

import jaxtok
from jaxtok.cli import main
from jaxtok.interop import gguf as interop
from jaxtok.interop.huggingface import write_folder
from jaxtok.nn.rotary import RopeScaling, rotary_frequencies
from jaxtok.tokenizers import load_tokenizer

KINDS = {"llama": "smollm", "qwen2": "qwen2", "gpt2": "gpt-2", "gemma": "llama-bpe"}
"""Architectures, each with another pre-tokenizer."""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "jaxtok"


@pytest.fixture(scope="module")
def fields():
    """The metadata of a tokenizer for each pre-tokenizer, and the tokenizer itself."""
    found = {pre: byte_level(pre) for pre in KINDS.values()}
    return {pre: (tokenizer_fields(pre, own), own) for pre, own in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture_is_read_as_it_was_written(kind, fields, tmp_path):
    config, params = write_gguf(tmp_path / "tiny.gguf", kind, fields[KINDS[kind]][0])
    model = jaxtok.open(tmp_path / "tiny.gguf")
    assert (model.ends, model.pad) == ((2,), 0)
    assert model.begin == ((1,) if KINDS[kind] == "llama-bpe" else ())
    body = model.task.model
    assert (body.head_dim, body.kv_heads, body.d_model) == (config.head_dim, config.kv_heads, config.d_model)
    assert body.tie_embeddings == config.tie_embeddings and body.norm_eps == pytest.approx(1e-5)
    assert jax.tree.structure(model.params) == jax.tree.structure(params)
    exact = {"rtol": 0, "atol": 1e-6 if kind == "gemma" else 0}  # its norms are written with 1 added
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, **exact), model.params, params)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "llama")) for k in KINDS])
def test_logits_are_those_of_transformers(kind, fields, tmp_path):
    """Of its own reading of the file, too, where it knows the architecture; and greedy ids are equal."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    quantized = gguf.GGMLQuantizationType.Q8_0
    config, _ = write_gguf(tmp_path / "tiny.gguf", kind, fields[KINDS[kind]][0], quantized=quantized)
    model = jaxtok.open(tmp_path / "tiny.gguf")
    folder = write_folder(tmp_path / "folder", model.task.model, model.params)
    ids = np.random.default_rng(0).integers(3, config.vocab_size, (2, 20))
    ours = np.asarray(model.logits(ids))
    theirs = {"folder": transformers.AutoModelForCausalLM.from_pretrained(folder)}
    if kind != "gemma":
        read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
        theirs["file"] = read
    for name, other in theirs.items():
        with torch.no_grad():
            expected = other.eval()(torch.from_numpy(ids)).logits.numpy()
        np.testing.assert_allclose(ours, expected, atol=1e-4 * max(1, np.abs(expected).max()), err_msg=name)
    given = ids[:1, :5]
    new = theirs["folder"].generate(torch.from_numpy(given), max_new_tokens=12, do_sample=False, eos_token_id=2)
    text = model.generate_bytes([given[0].tolist()], 12, temperature=0)[0]
    assert text == b"".join(model.tokenizer.token_bytes(i) for i in new[0, 5:].tolist())


@pytest.mark.parametrize("pre", KINDS.values())
def test_byte_level_tokenizers(pre, fields, tmp_path):
    own_fields, own = fields[pre]
    write_gguf(tmp_path / "tiny.gguf", "llama", own_fields)
    tokenizer = jaxtok.open(tmp_path / "tiny.gguf").tokenizer
    own.encode_special_tokens = True
    for text in texts(500):
        text = unicodedata.normalize("NFC", text)
        ids = tokenizer.encode(text)
        assert ids == own.encode(text, add_special_tokens=False).ids, text
        assert tokenizer.decode(ids) == text.encode() and own.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(prefix, tmp_path):
    own = sentences(tmp_path / "own.model", prefix)
    fields = sentence_fields(own) | {"add_space_prefix": prefix}
    write_gguf(tmp_path / "tiny.gguf", "gemma", fields)
    model = jaxtok.open(tmp_path / "tiny.gguf")
    assert (model.begin, model.ends) == ((own.bos_id(),), (own.eos_id(),))
    for text in [*texts(500), "a<turn>b", " <turn>  c"]:
        ids = model.tokenizer.encode(text)
        assert ids == own.encode(text), text
        assert model.tokenizer.decode(ids) == text.encode()
    assert model.tokenizer.encode_chat("<s>a</s>") == [own.bos_id(), *own.encode("a"), own.eos_id()]


def test_every_type_is_dequantised(tmp_path):
    """The types that the library can read, also those which it cannot write."""
    rng = np.random.default_rng(0)
    for kind in QUANTIZED:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = rng.integers(0, 255, (8, 256 // block * size), dtype=np.uint8)
        writer = gguf.GGUFWriter(tmp_path / f"{kind.name}.gguf", "llama")
        writer.add_tensor("token_embd.weight", raw, raw_dtype=kind)
        writer.add_uint32("llama.attention.head_count", 4)
        for step in ("header", "kv_data", "tensors"):
            getattr(writer, f"write_{step}_to_file")()
        writer.close()
        path = tmp_path / f"{kind.name}.gguf"
        with np.errstate(all="ignore"):
            found = interop._Tensors(path, interop.read_file(path))["model.embed_tokens.weight"]
            expected = gguf.dequantize(raw, kind)
        assert found.shape == (8, 256) and found.dtype == np.float32, kind
        np.testing.assert_array_equal(found, expected)


def test_bfloat16_stays(fields, tmp_path):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", fields["smollm"][0], quantized=gguf.GGMLQuantizationType.BF16)
    assert jaxtok.open(path).task.model.param_dtype == "bfloat16"


def test_rope(fields, tmp_path):
    def scaling(**changes):
        write_gguf(tmp_path / "tiny.gguf", "llama", fields["smollm"][0], **changes)
        return jaxtok.open(tmp_path / "tiny.gguf").task.model.rotary_scaling

    linear = scaling(settings={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert (linear.kind, linear.factor) == ("linear", 4.0)
    old = scaling(settings={"rope.scale_linear": 2.0})
    assert (old.kind, old.factor) == ("linear", 2.0)
    yarn = scaling(
        settings={
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 2.0,
            "rope.scaling.original_context_length": 32,
        }
    )
    assert (yarn.kind, yarn.factor, yarn.original_length) == ("yarn", 2.0, 32)
    base = {"rope.freq_base": 5e5}
    plain, _ = rotary_frequencies(8, 5e5)
    llama3 = RopeScaling(kind="llama3", factor=8.0, original_length=8192)
    divisors = plain / rotary_frequencies(8, 5e5, llama3)[0]
    assert scaling(settings=base, tensors={"rope_freqs.weight": divisors}) == dataclasses.replace(llama3, length=64)
    other = scaling(settings=base, tensors={"rope_freqs.weight": np.array([1, 2, 3, 4], np.float32)})
    np.testing.assert_allclose(rotary_frequencies(8, 5e5, other)[0], plain / [1, 2, 3, 4], rtol=1e-6)
    assert scaling(tensors={"rope_freqs.weight": np.ones(4, np.float32)}) is None


REFUSED = {
    "architecture": (
        {"kind": "mamba"},
        {},
        "has the architecture 'mamba'; it must be one of llama, qwen2",
    ),
    "pre-tokenizer": ({}, {"pre": "tekken"}, "has the pre-tokenizer 'tekken'; it must be one of gpt-2, smollm"),
    "no pre-tokenizer": ({}, {"pre": None}, "has the pre-tokenizer None"),
    "kind of tokenizer": ({}, {"model": "t5"}, "has a tokenizer of the kind 't5'; it must be gpt2 or llama"),
    "end": ({}, {"eos_token_id": None}, "does not say what ends a text"),
    "an id": ({}, {"eos_token_id": 10**6}, "has eos_token_id = 1000000; ids are 0 to"),
    "rope": ({"settings": {"rope.scaling.type": "longrope"}}, {}, "rope scaling with type 'longrope'"),
    "rope twice": (
        {"settings": {"rope.scaling.type": "yarn"}, "tensors": {"rope_freqs.weight": np.full(4, 2, np.float32)}},
        {},
        "rope scaling of the type 'yarn' and rope_freqs.weight",
    ),
    "half rotated": ({"settings": {"rope.dimension_count": 4}}, {}, "rope.dimension_count = 4; it must be the head's"),
    "experts": ({"settings": {"expert_count": 8}}, {}, "expert_count = 8; models of experts"),
    "a setting": ({"settings": {"attention.sliding_window": 16}}, {}, "llama.attention.sliding_window = 16, which"),
    "a missing tensor": ({"leave_out": ("blk.1.attn_q",)}, {}, "model.layers.1.self_attn.q_proj.weight is missing"),
    "an unknown tensor": (
        {"tensors": {"blk.0.extra.weight": np.ones(3, np.float32)}},
        {},
        "blk.0.extra.weight is",
    ),
    "one of several": ({"settings": {}}, {}, "is one of 3 files"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named(name, fields, tmp_path, capsys):
    options, changes, message = REFUSED[name]
    kind = options.get("kind", "llama")
    own = {key: value for key, value in (fields["smollm"][0] | changes).items() if value is not None}
    path = tmp_path / "tiny.gguf"
    if kind == "llama":
        write_gguf(path, "llama", own, **options)
    else:
        write_other(path, kind, {})
    if name == "one of several":
        write_other(path, "llama", {"split.count": 3})
    assert main(["generate", str(path), "--prompt", "a"]) == 1
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error


def write_other(path, kind, fields):
    writer = gguf.GGUFWriter(path, kind)
    for name, value in fields.items():
        writer.add_uint16(name, value)
    writer.add_tensor("a.weight", np.ones((2, 2), np.float32))
    for step in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{step}_to_file")()
    writer.close()


def test_a_damaged_file(fields, tmp_path, capsys):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", fields["smollm"][0])
    whole = path.read_bytes()
    for size in (100, 3000, len(whole) - 50):
        path.write_bytes(whole[:size])
        assert main(["generate", str(path)]) == 1
        assert "is damaged or not a GGUF file" in " ".join(capsys.readouterr().err.split())


def test_by_the_verbs(fields, tmp_path, capfdbinary):
    """generate, eval, adapt and convert take the file; a run that is made of it has its tokenizer and template."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "llama", fields["smollm"][0], template=TEMPLATE)
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"This is line {n}, with some words in it.\n" for n in range(40)))
    options = ["--max-new-tokens", "5", "--temperature", "0"]
    assert main(["generate", str(path), "--prompt", "This is", *options]) == 0
    plain = capfdbinary.readouterr().out
    assert plain.startswith(b"This is")
    assert main(["convert", str(path), str(tmp_path / "run")]) == 0
    capfdbinary.readouterr()
    assert main(["generate", str(tmp_path / "run"), "--prompt", "This is", *options]) == 0
    assert capfdbinary.readouterr().out == plain
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "folder")]) == 0
    capfdbinary.readouterr()
    answers = []
    for place in (path, tmp_path / "run", tmp_path / "folder"):
        assert main(["generate", str(place), "--chat", "--prompt", "a line", *options]) == 0
        answers.append(capfdbinary.readouterr().out)
        model = jaxtok.open(place)
        assert answers[-1] == (model.chat("a line", 5, temperature=0) + "\n").encode()
        ids = model.chat_ids([{"role": "user", "content": "a line"}])
        assert ids[0] == 1 and ids.count(2) == 1 and model.tokenizer.decode(ids) == b"user\na line\nassistant\n"
    assert len(set(answers)) == 1
    for verb in (["eval", "--split", "all", "--batches", "1"], ["adapt", "--output", str(tmp_path / "adapted")]):
        assert main([verb[0], str(path), "--corpus", str(corpus), *verb[1:]]) == 0
    assert jaxtok.open(tmp_path / "adapted").chat_ids("a line") == ids
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "new.gguf")]) == 1
    assert b"can only be read" in capfdbinary.readouterr().err and not (tmp_path / "new.gguf").exists()


def test_without_a_template_there_is_no_chat(fields, tmp_path, capsys):
    write_gguf(tmp_path / "tiny.gguf", "llama", fields["smollm"][0])
    assert main(["generate", str(tmp_path / "tiny.gguf"), "--chat", "--prompt", "a"]) == 1
    assert "has no chat template; put one there as chat_template.jinja" in " ".join(capsys.readouterr().err.split())
    data = dataclasses.replace(jaxtok.open(tmp_path / "tiny.gguf").data, tokenizer="bytes")
    model = dataclasses.replace(jaxtok.open(tmp_path / "tiny.gguf"), data=data, tokenizer=load_tokenizer("bytes"))
    with pytest.raises(ValueError, match="which has no chat template; give a language model whose tokenizer has one"):
        model.chat("a")


def test_tokenizer_files_are_written_once(fields, tmp_path, cache):
    write_gguf(tmp_path / "tiny.gguf", "llama", fields["smollm"][0], template=TEMPLATE)
    (spec,) = {jaxtok.open(tmp_path / "tiny.gguf").data.tokenizer for _ in range(2)}
    (folder,) = (cache / "gguf").iterdir()
    assert str(folder / "tokenizer.json") == spec
    assert json.loads((folder / "tokenizer_config.json").read_text())["eos_token"] == "<|im_end|>"
