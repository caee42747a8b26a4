"""Exact bytes against the official code's numbers and brute force. See `tests/goldens/byte_exact/README.md`."""

from __future__ import annotations

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from byte_lms import Config, FirstOrder, Toy, exact, induced

from jaxtok.decoding import Engine, Sampling
from jaxtok.decoding.byte_exact import NOTHING
from jaxtok.decoding.byte_model import ByteMixture
from jaxtok.decoding.byte_vocabulary import SPACE
from jaxtok.interop.huggingface import params_from
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.llama import LlamaConfig
from jaxtok.tokenizers import HuggingFaceTokenizer, SentencePieceTokenizer

NEW = 32


@functools.partial(jax.jit, static_argnames="member")
def states(member, params, state, text, counts):
    """The state before each byte of a text, and after the last; for one more reading of it than it has bytes."""

    def body(state, n):
        return member.absorb(params, state, text[:, n], n < counts), (state.next, state.logprob, state.next_mass)

    return jax.lax.scan(body, state, jnp.arange(text.shape[1]))[1]


def along(member, params, prompts, texts, contexts, length=NEW, inside=False):
    """next, logprob and next_mass after each prompt, and after each byte that follows: [batch, length, ...]."""
    state = member.prefill(params, prompts, contexts, new=length, inside=inside)
    padded = np.stack([np.pad(np.frombuffer(bytes(t), np.uint8), (0, length - len(t))) for t in texts]).astype(np.int32)
    found = states(member, params, state, padded, np.array([*map(len, texts)]))
    return state, [np.moveaxis(np.asarray(x), 0, 1) for x in found]


def llama(config, params):
    size = LlamaConfig(
        num_layers=config["num_hidden_layers"],
        d_model=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        mlp_dim=config["intermediate_size"],
        vocab_size=config["vocab_size"],
        max_length=256,
        norm_eps=config["rms_norm_eps"],
        rotary_base=config["rope_theta"],
        tie_embeddings="lm_head.weight" not in params,
    )
    return Decoder(size), params_from(size, params)


def sentencepiece(folder, array, name="model"):
    file = folder / f"{name}.model"
    file.write_bytes(array.tobytes())
    return SentencePieceTokenizer(file)


def text_of(pieces) -> bytes:
    return bytes(np.asarray(pieces, np.uint8)).replace(SPACE, b" ")


def covers_of(vocabulary, text, member):
    """The covers of the bytes after the anchor, by the vocabulary alone."""
    found = []
    for open_, node in vocabulary.covers(text, member._slots, member.policy, 0).open:
        trie = vocabulary.trie
        if node == 0:
            found.append(open_.tokens)
            continue
        longer = trie.order[trie.low[node] + len(trie.ending[node]) : trie.high[node]]
        found += [(*open_.tokens, int(token)) for token in longer if open_.follow[token]]
    return found


@pytest.mark.parity("byte_exact/official_bpe*.npz")
def test_official_predictions(golden, tmp_path):
    """All prompts of a file are rows of a batch. The differences are absolute, of probabilities."""
    model, params = llama(golden.config, golden.under("params"))
    tokenizer = sentencepiece(tmp_path, golden["in/sp_model"])
    cases = range(len(golden.config["cases"]))
    prompts = [text_of(golden[f"in/prompt_{case}"]) for case in cases]
    more = [golden[f"in/continuation_{case}"].astype(np.uint8).tobytes() for case in cases]
    bos = [[golden.config["bos_id"]]] * len(prompts)
    for policy, name in (("truncate", "pred"), ("prompt", "pred_fast")):
        member = exact(model, tokenizer, policy, domain="piece")
        state, absorb = member.prefill(params, prompts, bos, new=NEW), jax.jit(member.absorb)
        for step in range(max(map(len, more)) + 1):
            for case, text in enumerate(more):
                if step > len(text):
                    continue
                np.testing.assert_allclose(np.exp(state.next[case]), golden[f"out/{name}_{case}"][step], atol=1e-5)
                if policy == "truncate":
                    check_covers(
                        golden, member, state, case, step, [*bos[case], *member.vocabulary.anchored(prompts[case])[0]]
                    )
            symbols = np.array([text[step] if step < len(text) else NOTHING for text in more], np.int32)
            state = absorb(params, state, symbols, np.ones(len(more), bool))


def check_covers(golden, member, state, case, step, chain):
    """The encoding of a case's text after some bytes, valid next tokens, and the covers with their probabilities."""
    encoding = golden[f"out/encoding_{case}"][step]
    encoding = encoding[encoding >= 0].tolist()
    exacts = [sequence for sequence, node in member.open(state, case) if node == 0]
    if exacts:  # inside a space, or a character, there may be no token for it
        assert [*chain, *exacts[0].tokens] == encoding
    count = golden[f"mid/n_covers_{case}"][step]
    reference = golden[f"mid/cover_logp_{case}"][step, :count]
    covers = member.covers(state, case)
    assert len(covers) == count
    logprobs = np.array(sorted(covers.values(), reverse=True))
    np.testing.assert_allclose(logprobs - logprobs[0], reference, atol=1e-3)
    if f"mid/covers_{case}" not in golden.arrays:
        return
    before = encoding[: golden[f"out/n_context_{case}"][step]]
    names = [(*before, *row[row >= 0]) for row in golden[f"mid/covers_{case}"][step, :count]]
    ours = {(*chain, *tokens): value - logprobs[0] for tokens, value in covers.items()}
    assert set(ours) == set(names)
    np.testing.assert_allclose([ours[name] for name in names], reference, atol=1e-3)
    if exacts:
        valid = exacts[0].follow.copy()
        valid[list(member.vocabulary.specials)] = exacts[0].ends
        np.testing.assert_array_equal(valid, golden[f"mid/valid_next_{case}"][step])


def weights_of(golden, number):
    return {name.removeprefix(f"{number}."): a for name, a in golden.under("params").items() if name[0] == str(number)}


@pytest.mark.parity("byte_exact/official_ensemble*.npz")
def test_official_ensemble(golden, tmp_path):
    members, params, bos = [], [], []
    for number, config in enumerate(golden.config["models"]):
        model, weights = llama(config, weights_of(golden, number))
        tokenizer = sentencepiece(tmp_path, golden[f"in/{number}_sp_model"], str(number))
        members.append(exact(model, tokenizer, domain="piece"))
        params.append(weights)
        bos.append([[config["bos_id"]]])
    mixture, text = ByteMixture(members=tuple(members)), golden["in/continuation"].astype(np.int32)[None]
    prompt = [text_of(golden["in/prompt"])]
    begun = tuple(m.prefill(p, prompt, b, new=NEW) for m, p, b in zip(members, params, bos))

    @jax.jit
    def vectors(params, state):
        def body(state, symbol):
            return mixture.step(params, symbol, state, jnp.ones(1, bool))[1], mixture.combined(state)

        return jax.lax.scan(body, state, jnp.pad(text, ((0, 0), (0, 1))).T)[1]

    np.testing.assert_allclose(np.exp(vectors(tuple(params), begun)[:, 0]), golden["out/pred"], atol=1e-5)
    greedy = golden["out/greedy"]
    engine = Engine(model=mixture, chooser=Sampling(temperature=0))
    state = engine.begin(begun, np.full((1, 1), NOTHING), new=len(greedy))
    assert np.asarray(engine.run(tuple(params), state).text)[0, 1:].tolist() == greedy.tolist()


@pytest.mark.parity("byte_exact/numpy_context*.npz")
def test_contexts(golden, tmp_path):
    """A prompt after sentinels and a suffix. All prompts are rows of a batch."""
    model, params = llama(golden.config, golden.under("params"))
    tokenizer = sentencepiece(tmp_path, golden["in/sp_model"])
    cases = range(len(golden.config["prefixes"]))
    prompts = [text_of(golden[f"in/prefix_{case}"]) for case in cases]
    context = golden["in/context_ids"].tolist()
    member = exact(model, tokenizer, domain="piece")
    state = member.prefill(params, prompts, [context] * len(prompts), new=0, inside=True)
    full_pass = jax.jit(lambda ids: jax.nn.log_softmax(model.apply({"params": params}, ids)[0][0]))
    for case in cases:
        chain, _ = member.vocabulary.anchored(prompts[case], inside=True)
        ids = jnp.array([[*context, *chain]])
        likely = np.asarray(full_pass(ids))
        before = sum(float(likely[len(context) - 1 + i, token]) for i, token in enumerate(chain))
        covers = {(*chain, *tokens): value + before for tokens, value in member.covers(state, case).items()}
        names = [tuple(row[row >= 0]) for row in golden[f"out/covers_{case}"]]
        assert set(covers) == set(names)
        np.testing.assert_allclose([covers[name] for name in names], golden[f"out/cover_logp_{case}"], atol=1e-3)
        total = float(state.logprob[case]) + before
        np.testing.assert_allclose(total, golden[f"out/log_prob_prefix_{case}"], atol=1e-3)
        np.testing.assert_allclose(np.exp(state.next[case]), golden[f"out/pred_{case}"], atol=1e-5)


def tokenizer_of(golden):
    if "in/tokenizer_json" in golden.arrays:
        return HuggingFaceTokenizer(json.loads(golden["in/tokenizer_json"].tobytes()), eod=golden.config["eos"])
    return Toy(golden.config["vocab"], golden.config["merges"])


@pytest.mark.parity("byte_exact/numpy_chain*.npz")
def test_chains(golden):
    """The token model that a chain over bytes induces gives back the chain, in float64. A row for each prefix."""
    with jax.enable_x64(True):
        tokenizer, alphabet = tokenizer_of(golden), golden.config["alphabet"].encode()
        model, params = induced(golden.config, golden.arrays, tokenizer)
        assert len(params[0]) == len(golden["mid/contexts"])
        letters = np.frombuffer(alphabet, np.uint8)
        prompts = [letters[row[row >= 0]].tobytes() for row in golden["in/prefixes"]]
        begin = [[golden.config["eos"]]] * len(prompts)
        member = exact(model, tokenizer)
        state = member.prefill(params, prompts, begin, new=0)
        np.testing.assert_allclose(np.exp(state.next[:, letters]), golden["out/byte_conditional"], rtol=0, atol=1e-9)
        if golden.config["kind"] != "regex":
            assert np.abs(golden["out/token_level"] - golden["out/byte_conditional"]).max() > 0.3  # without covers
            counts = [len(covers_of(member.vocabulary, text, member)) for text in prompts]
            whole = [member.vocabulary.anchored(text)[0] == [] for text in prompts]
            np.testing.assert_array_equal(np.array(counts)[whole], golden["mid/n_covers"][whole])
            return
        canonical = exact(model, tokenizer, "prompt", validity="canonical")
        reference = golden["out/canonical_only"]
        covered = ~np.isnan(reference).any(-1)
        some = [text for text, there in zip(prompts, covered) if there]
        state = canonical.prefill(params, some, begin[: len(some)], new=0)
        ours = np.exp(np.asarray(state.next[:, letters]))
        np.testing.assert_allclose(ours / ours.sum(-1, keepdims=True), reference[covered], rtol=0, atol=1e-9)


@pytest.mark.parity("byte_exact/numpy_policies*.npz")
def test_policies(golden):
    with jax.enable_x64(True):
        tokenizer, params = tokenizer_of(golden), jnp.asarray(golden["in/log_probs"])
        model, alphabet = FirstOrder(Config(len(params))), np.frombuffer(golden.config["alphabet"].encode(), np.uint8)
        texts = [text.encode() for text in golden.config["texts"]]
        for policy in ("truncate", "truncate_renormalize", "none"):
            member = exact(model, tokenizer, policy)
            begin = [[golden.config["bos_row"]]] * len(texts)
            _, (following, logprob, mass) = along(member, params, [b""] * len(texts), texts, begin)
            for row, text in enumerate(texts):
                steps = slice(1, len(text) + 1)
                ours = np.exp(following[row, steps][:, [*alphabet, 256]])
                np.testing.assert_allclose(ours, golden[f"out/{policy}_{row}"], rtol=0, atol=1e-9)
                both = np.stack([logprob[row, steps], mass[row, steps]], -1)
                np.testing.assert_allclose(both, golden[f"out/{policy}_logZ_{row}"], rtol=0, atol=1e-9)


@pytest.mark.parity("byte_exact/numpy_bytelevel*.npz", "byte_exact/numpy_regex*.npz")
def test_byte_level(golden):
    """Walks over text, from its first byte on, with the tokenizers of Hugging Face's library."""
    tokenizer, params = tokenizer_of(golden), jnp.asarray(golden["in/log_probs"])
    texts = [golden[f"in/text_{number}"].tobytes() for number in range(len(golden.config["texts"]))]
    member = exact(FirstOrder(Config(len(params))), tokenizer)
    begin = [[golden.config["bos_row"]]] * len(texts)
    _, (following, _, _) = along(member, params, [b""] * len(texts), texts, begin)
    strings = member.vocabulary.strings
    for row, (text, start) in enumerate(zip(texts, golden.config["start"])):
        reference = golden[f"out/pred_{row}"]
        np.testing.assert_allclose(np.exp(following[row, start : start + len(reference)]), reference, atol=1e-5)
        for number, count in enumerate(golden[f"mid/n_covers_{row}"]):
            covers = covers_of(member.vocabulary, text[: start + number], member)
            if golden.config["use_regex"]:  # other tokens do not count in this file
                covers = [cover for cover in covers if all(strings[i].isascii() for i in cover)]
                exacts = [cover for cover in covers if b"".join(strings[i] for i in cover) == text[: start + number]]
                assert len(exacts) == golden[f"mid/n_exact_{row}"][number]
            else:
                encoding = golden[f"out/encoding_{row}"][number]
                assert tuple(encoding[encoding >= 0]) in covers
            assert len(covers) == count, (row, number)
