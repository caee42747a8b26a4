"""Extensible Tokenization's exact statements, its way through the loop and the verbs, and what it refuses."""

from __future__ import annotations

import dataclasses
import doctest
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from causal_lms import noisy_params

from jaxtok.decoding import PromptLookup, Sampling, generate, parse_evictor
from jaxtok.door import open_model
from jaxtok.lm import extensible
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.extensible import (
    Extensible,
    ExtensibleConfig,
    ExtensibleModeling,
    document_indices,
    generate_after,
    kept_indices,
    open_documents,
    save_documents,
    smallest_scale,
)
from jaxtok.lm.gpt2 import GPT2Config
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.protocols import FROZEN, CausalLM
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.extensible import AddExtensibleTokenizer
from jaxtok.transfer.lora import Lora
from jaxtok.verbs import evaluate
from jaxtok.verbs import generate as generate_verb

GREEDY = Sampling(temperature=0)
CHUNK = 4


def case() -> tiny.Case:
    base = tiny.text(LlamaConfig(**tiny.SIZES, num_kv_heads=2, mlp_dim=32))
    model = ExtensibleConfig(lm=base.task, layers=1, session=8, scale=2)
    return dataclasses.replace(base, task=ExtensibleModeling(model=model, chunk=CHUNK, scales=(1, 2)))


TASKS = {"extensible": case}


def operation() -> tiny.Operation:
    there = case()
    before = dataclasses.replace(there, task=there.task.model.lm)
    return tiny.Operation(AddExtensibleTokenizer(to=there.task, steps=2), before, there.task)


SURGERIES = {"extensible": operation}


SIZES = {"num_layers": 2, "d_model": 16, "num_heads": 2, "mlp_dim": 24, "vocab_size": 32, "max_length": 24}
CONFIG = ExtensibleConfig(lm=LanguageModeling(model=LlamaConfig(**SIZES)), layers=1, session=24, scale=4)


@functools.cache
def some_params():
    return noisy_params(Extensible(CONFIG))


def model(**fields):
    """A config, and parameters of which none is zero."""
    return dataclasses.replace(CONFIG, **fields), some_params()


@functools.partial(jax.jit, static_argnames=("config", "method", "k", "chunk"))
def apply(config, params, tokens, *args, method=None, k=None, chunk=None, **options):
    options |= {name: value for name, value in (("k", k), ("chunk", chunk), ("method", method)) if value is not None}
    return Extensible(config).apply({"params": params}, tokens, *args, **options)


def nats(config, params, tokens, k=2, **options):
    targets = jnp.roll(tokens, -1, axis=1)
    return apply(config, params, tokens, targets, method="nats", k=k, chunk=CHUNK, **options)[0]


def some_tokens(batch, length, seed=2):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, 32)


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def test_sharing_a_call_changes_nothing():
    """The same nats whether the window holds one chunk at a time, two, or all; also of two documents in a row."""
    tokens = some_tokens(2, 20)
    segments = jnp.where(jnp.arange(20) < jnp.array([[20], [9]]), 1, 2)
    one, two, whole = (nats(*model(window=window), tokens, k=4, segments=segments) for window in (8, 12, 24))
    assert_close(one, whole)
    assert_close(two, whole)
    together = nats(*model(window=24), tokens, k=4)
    assert_close(whole[0], together[0])
    assert np.abs(whole[1] - together[1]).max() > 1e-3


def test_a_chunk_is_seen_by_later_ones_through_its_ets_only():
    config, params = model(session=8)
    tokens = some_tokens(1, 20)
    other = tokens.at[:, 10].set((tokens[:, 10] + 1) % 32)  # in chunk 3 of 5
    before, after = (nats(config, params, x).reshape(4, CHUNK) for x in (tokens, other))
    np.testing.assert_array_equal(before[0], after[0])
    assert (np.abs(before[1:] - after[1:]).max(1) > 1e-5).all()
    outputs = apply(config, params, tokens, method="outputs")
    before, after = (nats(config, params, x, outputs=outputs).reshape(4, CHUNK) for x in (tokens, other))
    np.testing.assert_array_equal(before[2:], after[2:])


def test_documents_of_a_row_do_not_see_each_other():
    """A row of two documents gives the second one's tokens what they have alone, where chunks and sessions agree."""
    config, params = model(session=8)
    first, second = some_tokens(1, 8), some_tokens(1, 12, seed=3)
    segments = jnp.where(jnp.arange(20) < 8, 1, 2)[None]
    row = nats(config, params, jnp.concatenate([first, second], 1), segments=segments).reshape(4, CHUNK)
    alone = nats(config, params, second).reshape(2, CHUNK)
    assert_close(row[2:], alone)


def test_the_language_model_gets_no_gradient():
    task = case().task
    params = jax.jit(task.init)(jax.random.key(0), case().batch)
    gradient = jax.jit(jax.grad(lambda p: task.loss(p, case().batch, jax.random.key(0), 0)[0]))(params)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(gradient[FROZEN]))
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(gradient["tokenizer"]))


def test_an_et_depends_on_its_session_up_to_its_last_token():
    config, params = model(session=8)
    tokens = some_tokens(1, 22)
    outputs = apply(config, params, tokens, method="outputs")
    for place in (3, 9, 21):
        changed = apply(config, params, tokens.at[:, place].set((tokens[:, place] + 1) % 32), method="outputs")
        differs = np.abs(changed - outputs).max((0, 2)) > 0
        assert differs[place] and not differs[:place].any() and not differs[place // 8 * 8 + 8 :].any()
    own = {**params, FROZEN: jax.tree.map(lambda x: x + 1, params[FROZEN])}
    np.testing.assert_array_equal(apply(config, own, tokens, method="outputs"), outputs)
    assert set(document_indices(22, 8, 8)) <= set(document_indices(22, 8, 4))


def test_counts():
    for length in (0, 1, 7, 8, 22):
        for k in (1, 3, 8):
            sessions = [min(8, length - start) for start in range(0, length, 8)]
            assert len(document_indices(length, 8, k)) == sum(-(-n // k) for n in sessions)


def test_the_tokenizer_begins_as_the_first_layers():
    task = case().task
    params = jax.jit(task.init)(jax.random.key(0), case().batch)
    lm, own = jax.device_get((params[FROZEN], params["tokenizer"]))
    assert own.keys() == {"embedding", "stack", "final_norm"}
    chex.assert_trees_all_equal(own["stack"], jax.tree.map(lambda x: x[:1], lm["stack"]))
    chex.assert_trees_all_equal(own["embedding"], lm["embedding"])
    chex.assert_trees_all_equal(own["final_norm"], lm["final_norm"])


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_bare_table_at_k_1_is_the_language_model(kind):
    size = LlamaConfig(**SIZES) if kind == "llama" else GPT2Config(**SIZES)
    lm = LanguageModeling(model=size)
    config = ExtensibleConfig(lm=lm, layers=0, output_norm=False, session=8, scale=1)
    task = ExtensibleModeling(model=config, chunk=CHUNK, scales=(1,))
    params = task.start(noisy_params(Decoder(size)), jax.random.key(0))
    assert params["tokenizer"].keys() <= {"embedding", "positions"}
    tokens = some_tokens(2, 20)
    plain, _ = jax.jit(Decoder(size).apply)({"params": params[FROZEN]}, tokens)
    ets = apply(config, params, tokens, method="outputs")
    logits, _ = apply(config, params, (ets[:, :12], tokens[:, 12:]), method="read")
    assert_close(logits, plain)
    assert_close(apply(config, params, tokens)[0], plain)
    assert config.max_length == 24  # k = 1 makes no room


@functools.partial(jax.jit, static_argnums=0)
def last_logits(config, params, x, slots):
    hidden, _ = Extensible(config).apply({"params": params}, x, method="hidden")
    return Extensible(config).apply({"params": params}, hidden, method="head")[0, slots - 1]


def streamed(config, params, tokens):
    """Logits after each token of a row, each computed anew from ETs and raw tokens (section 3.4).

    What a causal model has not come to yet is filled up with zeros, so that all calls have one shape.
    """
    k, raw, ets, logits = config.scale, [], [], []
    table = np.asarray(apply(config, params, jnp.arange(32)[None], method="embed"))[0]
    for token in tokens:
        raw.append(int(token))
        count = min(len(raw), config.session) // k * k
        if len(ets) + len(raw) == config.slots and count > count // k:
            session = np.zeros((1, config.session), np.int32)
            session[0, :count] = raw[:count]
            outputs = np.asarray(apply(config, params, jnp.asarray(session), method="outputs"))[0]
            ets, raw = [*ets, *outputs[k - 1 : count : k]], raw[count:]
        x = np.zeros((1, config.slots, table.shape[1]), np.float32)
        x[0, : len(ets) + len(raw)] = [*ets, *table[raw]]
        logits.append(last_logits(config, params, jnp.asarray(x), len(ets) + len(raw)))
    return jnp.stack(logits)


@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="sessions of a window", marks=pytest.mark.slow),
        pytest.param({"session": 8, "scale": 3}, id="short sessions"),
    ],
)
def test_streaming_is_what_recomputing_says(fields):
    """In one pass, in pieces, and token by token; rows of several lengths, with padding anywhere."""
    config, params = model(**fields)
    tokens = some_tokens(2, 50)
    whole, none = apply(config, params, tokens)
    assert none is None
    assert_close(whole[0], streamed(config, params, tokens[0]))
    empty = Extensible(config).init_cache(2, 50)
    parts, cache = [], empty
    for start, end in ((0, 24), (24, 25), (25, 26), (26, 50)):
        logits, cache = apply(config, params, tokens[:, start:end], cache=cache)
        parts.append(logits)
    assert_close(jnp.concatenate(parts, 1), whole)
    positions = np.broadcast_to(np.arange(50), (2, 50)).copy()
    _, at_once = apply(config, params, tokens, positions=positions, cache=empty)
    chex.assert_trees_all_equal((cache.num_ets, cache.num_raw), (at_once.num_ets, at_once.num_raw))
    # row 1 has 17 tokens less, and padding in several places
    positions[1, [0, 5, *range(20, 35)]] = -1
    real = positions[1] >= 0
    logits, cache = apply(config, params, tokens, positions=positions, cache=empty)
    assert cache.length.tolist() == cache.next_position.tolist() == [50, 33]
    assert_close(logits[0], whole[0])
    assert_close(logits[1][real], streamed(config, params, tokens[1, real]))


def test_generation():
    """Beyond the window, alone and in a batch, streamed, with drafts; to the last token of `max_length`."""
    config, params = model()
    module = Extensible(config)
    assert isinstance(module, CausalLM)
    prompts = [some_tokens(1, n, seed=n)[0].tolist() for n in (31, 3)]
    made = generate(module, params, prompts, max_new_tokens=30, chooser=GREEDY)
    texts = [prompt + row for prompt, row in zip(prompts, made.tokens)]
    logits, _ = apply(config, params, jnp.array([text + [0] * (61 - len(text)) for text in texts]))
    for row, prompt in enumerate(prompts):
        own = logits[row, len(prompt) - 1 : len(texts[row]) - 1]
        assert own.argmax(-1).tolist() == made.tokens[row]
        np.testing.assert_allclose(made.logprobs[row], jax.nn.log_softmax(own).max(-1), atol=1e-4)
    drafted = generate(module, params, prompts, max_new_tokens=30, chooser=GREEDY, drafter=PromptLookup())
    assert drafted.tokens == made.tokens
    pieces = []
    generate(module, params, prompts, max_new_tokens=30, chooser=GREEDY, on_tokens=pieces.append, chunk=7)
    assert [[token for piece in pieces for token in piece.tokens[row]] for row in (0, 1)] == made.tokens
    longest = config.max_length
    (alone,) = generate(module, params, prompts[1:], max_new_tokens=longest - 3, chooser=GREEDY).tokens
    assert len(alone) == longest - 3 and alone[:30] == made.tokens[1]
    with pytest.raises(ValueError, match=f"exceed the model's max_length = {longest}"):
        generate(module, params, prompts[1:], max_new_tokens=longest - 2, chooser=GREEDY)
    with pytest.raises(ValueError, match="it must be None, as tokens cannot be taken out of the cache of Extensible"):
        generate(module, params, [[1]], max_new_tokens=2, chooser=GREEDY, evictor=parse_evictor("streaming:8"))


def test_documents(tmp_path):
    """Saved once, read at any k, by any language model, as if computed anew."""
    config, params = model(session=8)
    documents = {"a": some_tokens(1, 22)[0], "b": [3, 1, 4], "none": []}
    saved = save_documents(tmp_path / "d.safetensors", config, params, documents)
    assert saved.lengths == {"a": 22, "b": 3, "none": 0}
    outputs = apply(config, params, documents["a"][None], method="outputs")[0]
    for k in (1, 3, 4, 30):
        assert_close(saved.ets("a", k), outputs[document_indices(22, 8, k)])
    assert saved.ets("none", 4).shape == (0, 16) and saved.ets("b", 4).shape == (1, 16)
    assert_close(saved.ets("a", 4, "terminal"), outputs[jnp.array([6, 7, 14, 15, 20, 21])])
    assert saved.ets("a", 4, "random", seed=1).shape == (6, 16)
    derivative = {**params, FROZEN: jax.tree.map(lambda x: x + 0.05, params[FROZEN])}
    assert open_documents(saved.path, derivative) == saved
    half = save_documents(tmp_path / "h.safetensors", config, params, documents, dtype="bfloat16")
    np.testing.assert_allclose(np.asarray(half.ets("a", 2), np.float32), saved.ets("a", 2), rtol=1e-2)
    other = {**params, "tokenizer": jax.tree.map(lambda x: x + 1, params["tokenizer"])}
    with pytest.raises(ValueError, match="was made by another tokenizer than this model's"):
        open_documents(saved.path, other)
    with pytest.raises(ValueError, match=r"has no document 'c'; it has a, b, none"):
        saved.ets("c", 2)
    with pytest.raises(ValueError, match="a has ids from 0 to 32; they must be from 0 to 31"):
        save_documents(tmp_path / "no.safetensors", config, params, {"a": [0, 32]})
    with pytest.raises(FileExistsError):
        save_documents(saved.path, config, params, documents)


def test_examples_of_the_docstrings(tmp_path):
    config, params = model()
    found = doctest.testmod(extensible, extraglobs={"folder": tmp_path, "config": config, "params": params})
    assert found.attempted > 2 and found.failed == 0


def test_text_after_documents():
    config, params = model(session=8)
    document, question = some_tokens(2, 16), some_tokens(2, 3, seed=5)
    ets = apply(config, params, document, method="outputs")[:, 3::4]
    made = generate_after(config, params, [ets, question], max_new_tokens=6, chooser=GREEDY)
    text = jnp.concatenate([question, jnp.array(made.tokens)[:, :-1]], 1)
    logits, _ = apply(config, params, (ets, text), method="read")
    assert logits[:, 6:].argmax(-1).tolist() == made.tokens
    with pytest.raises(ValueError, match="the last part must be raw tokens"):
        generate_after(config, params, [question, ets], max_new_tokens=6, chooser=GREEDY)
    with pytest.raises(ValueError, match="a part has ids from 32 to 32; they must be from 0 to 31"):
        generate_after(config, params, [ets, jnp.full((2, 1), 32)], max_new_tokens=6, chooser=GREEDY)
    with pytest.raises(ValueError, match="the parts take 7 slots, and max_new_tokens is 18; the window has 24"):
        generate_after(config, params, [ets, question], max_new_tokens=18, chooser=GREEDY)


@pytest.mark.slow
def test_a_run_trains_freezes_and_is_used(tmp_path):
    """A language model is trained and frozen in one run; then the verbs use it, on texts longer than its window."""
    (tmp_path / "texts").mkdir()
    for number in range(60):
        (tmp_path / "texts" / f"{number}.txt").write_text(f"number {number}, twice {2 * number}. " * 12)
    lm = LanguageModeling(
        model=LlamaConfig(num_layers=2, d_model=16, num_heads=2, mlp_dim=24, vocab_size=384, max_length=24)
    )
    config = ExtensibleConfig(lm=lm, layers=1, session=8, scale=4)
    data = tiny.TextData(corpus=str(tmp_path / "texts"), length=24, batch_size=4, eval_limit=2, shuffle_window=8)
    experiment = Experiment(
        task=lm,
        data=data,
        train=TrainConfig(
            steps=3, log_every=1, eval_every=0, tensorboard=False, optimizer=OptimizerConfig(learning_rate=0.01)
        ),
        mesh=MeshConfig(data=1),
        stages=(
            AddExtensibleTokenizer(
                to=ExtensibleModeling(model=config, chunk=4, scales=(2, 4)), length=32, batch_size=2, steps=4
            ),
        ),
        workdir=str(tmp_path / "run"),
    )
    before = train(dataclasses.replace(experiment, stages=(), workdir=str(tmp_path / "lm")), quiet=True)
    result = train(experiment, quiet=True)
    assert result.step == 7 and isinstance(result.task, ExtensibleModeling)
    chex.assert_trees_all_equal(result.params[FROZEN], before.params)
    run = open_model(tmp_path / "run")
    assert run.data.length == 32 and run.module.config.max_length > 32
    numbers = evaluate(tmp_path / "run", batches=2)
    assert numbers["tokens"] > 0 and numbers["loss"] == pytest.approx(result.metrics["loss"])
    prompt = "number 1, twice 2. " * 2
    (text,) = generate_verb(tmp_path / "run", prompt=(prompt,), max_new_tokens=20, stream=False, stop_at_end=False)
    assert len(text) == 20
    assert run.logits(prompt).shape == (39, 384)
    derivative = dataclasses.replace(run, params={**run.params, FROZEN: open_model(tmp_path / "lm").params})
    assert derivative.generate(prompt, max_new_tokens=5, temperature=0.0, stop_at_end=False)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": 3}, "layers is 3; the language model has 2 to copy"),
        ({"scale": 0}, "scale is 0; it must be a whole number of at least 1"),
        ({"scale": 2.0}, "scale is 2.0; it must be a whole number"),
        ({"session": 25}, "session is 25; the tokenizer's max_length is 24"),
        ({"session": 2}, "scale is 4; it must be at most the session's 2 tokens"),
        ({"window": 25}, "window is 25; the language model's max_length is 24"),
        ({"body": GPT2Config(d_model=24, vocab_size=32)}, "body.d_model is 24 and the language model's is 16"),
        ({"body": GPT2Config(d_model=16, num_heads=2, vocab_size=31)}, "body.vocab_size is 31, but the language model"),
    ],
)
def test_impossible_models_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(model()[0], **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"chunk": 0}, "chunk is 0"),
        ({"scales": ()}, r"scales are \(\)"),
        ({"scales": (3,)}, "k is 3, which does not divide chunk = 8"),
        ({"chunk": 16}, "chunk is 16, which does not divide session = 24"),
        ({"scales": (True,)}, "k is True; it must be a whole number"),
    ],
)
def test_impossible_tasks_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ExtensibleModeling(model=model()[0], **{"chunk": 8, "scales": (4,)} | fields)


@pytest.mark.parametrize(
    ("length", "k", "message"),
    [
        (28, 1, "chunk 7 of 4 tokens, after 4 ETs for each chunk before it, takes 28 slots, but the window has 24"),
        (4, 2, "a row has 4 tokens; it must have at least two chunks"),
        (10, 2, "a row has 10 tokens"),
    ],
)
def test_rows_that_do_not_fit_are_refused(length, k, message):
    config, params = model()
    with pytest.raises(ValueError, match=message):
        nats(config, params, some_tokens(1, length), k=k)


def test_what_cannot_be_is_refused():
    config, params = model()
    with pytest.raises(ValueError, match="the window of 24 slots is full after"):
        apply(config, params, some_tokens(1, config.max_length + 1))
    for options in ({"segments": jnp.ones((1, 4), int)}, {"mask": jnp.ones((1, 4, 4), bool)}):
        with pytest.raises(ValueError, match="segments or a mask are given"):
            apply(config, params, some_tokens(1, 4), **options)
    cache = Extensible(config).init_cache(1, 8)
    for change in (cache.truncate, cache.gather):
        with pytest.raises(ValueError, match="extensible embeddings"):
            change(jnp.array([1]))
    with pytest.raises(ValueError, match="k is 0; it must be a whole number"):
        kept_indices(4, 0)
    with pytest.raises(ValueError, match="must be a permutation of 0 to 3"):
        kept_indices(4, 2, "random", [0, 0, 1, 2])
    with pytest.raises(ValueError, match="even with k = 4; shorten"):
        smallest_scale(100, 50, 60, (4, 2))
    with pytest.raises(ValueError, match="a Lora gets no extensible tokenizer"):
        AddExtensibleTokenizer(to=case().task).task(Lora(task=config.lm), case().data)
    with pytest.raises(ValueError, match="to is None"):
        AddExtensibleTokenizer().task(config.lm, case().data)
    with pytest.raises(ValueError, match="no parameters 'embedding' to copy"):
        case().task.start({}, jax.random.key(0))
