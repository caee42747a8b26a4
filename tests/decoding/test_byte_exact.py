"""What must hold exactly of models of bytes: probabilities, covers, ensembles, gaps, and what is refused."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import tempfile
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from byte_lms import Config, FirstOrder, Toy, exact, induced
from causal_lms import noisy_params
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtok.decoding import Generation, PromptLookup, Sampling, TokenRecycling, TreeTemplate
from jaxtok.decoding.byte_exact import ExactBytes
from jaxtok.decoding.byte_model import ByteMixture, ByteModel, Gap, generate_exact
from jaxtok.decoding.byte_validity import LOOKAHEAD, CutBytePairs, Merges, PiecePairs, Reencode, incomplete
from jaxtok.decoding.byte_vocabulary import vocabulary_of
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.llama import LlamaConfig
from jaxtok.studies.byte_exact import ByteCuts, ByteEnsembles, best_weights
from jaxtok.tokenizers import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer

EVIDENCE = {"byte_exact": {"generate, cached": "decoding/test_byte_exact.py::test_completing_takes_drafts_and_streams"}}

GOLDENS = Path(__file__).parents[1] / "goldens" / "byte_exact"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SAMPLE = "I'll we're don't “naïve” — été 12345   \n\n\n\tпривет мир "
GREEDY = Sampling(temperature=0)


def llama(vocab: int, seed: int = 0):
    size = LlamaConfig(
        num_layers=2, d_model=16, num_heads=2, mlp_dim=24, vocab_size=vocab, max_length=160, tie_embeddings=False
    )
    return Decoder(size), noisy_params(Decoder(size))


def opened(module, params, tokenizer, begin=None):
    """What `jaxtok.open` gives, as far as models of bytes look at it."""
    ends = tokenizer.special.eos
    return types.SimpleNamespace(
        module=module, params=params, tokenizer=tokenizer, begin=ends[:1] if begin is None else begin, ends=ends
    )


# Validity.


@st.composite
def toys(draw):
    """Byte pair encodings over two to four letters, whose merges come after those that make their parts."""
    vocab = list("abcd"[: draw(st.integers(2, 4))])
    merges = []
    for _ in range(draw(st.integers(0, 8))):
        pair = (draw(st.sampled_from(vocab)), draw(st.sampled_from(vocab)))
        if "".join(pair) not in vocab:
            merges.append(pair)
            vocab.append("".join(pair))
    return Toy(vocab, merges)


@given(toys())
@settings(max_examples=60, deadline=None)
def test_pairs_that_merging_leaves(toy):
    """The relation of pairs by the spines of their merges is that of encoding again; so it is for triples."""
    merges, again = Merges(toy._pieces, toy.merges()), Reencode(toy)
    for token in range(toy.eod_id):
        assert merges.alone[token] == (toy.encode(toy.token_bytes(token)) == [token])
        if not merges.alone[token]:
            continue
        np.testing.assert_array_equal(merges.after(token), again.follow((token,))[0])
        for other in np.flatnonzero(merges.after(token)):
            assert merges.before(int(other))[token]
            np.testing.assert_array_equal(merges.after(int(other)), again._follow((token, int(other)))[0])


@given(toys(), st.text("abcd", min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_covers_are_distinct_valid_and_minimal(toy, text):
    text = "".join(letter for letter in text if letter.encode() in toy._ids).encode()
    vocabulary = vocabulary_of(toy)
    covers = vocabulary.covers(text, 16)
    found = []
    for open_, node in covers.open:
        assert toy.encode(text[: open_.start]) == list(open_.tokens)
        low, high = vocabulary.trie.low[node] + len(vocabulary.trie.ending[node]), vocabulary.trie.high[node]
        more = [int(i) for i in vocabulary.trie.order[low:high] if open_.follow[i]]
        found += [open_.tokens] if node == 0 else [(*open_.tokens, token) for token in more]
    # Brute force: all encodings of the texts that begin with this one, up to the token that covers its end.
    expected = set()
    longest = vocabulary.longest
    letters = [piece.decode() for piece in toy._ids if len(piece) == 1]
    for more in map("".join, itertools.product(letters, repeat=min(longest - 1, 4))):
        tokens = toy.encode(text + more.encode())
        ends = [0, *itertools.accumulate(len(toy.token_bytes(token)) for token in tokens)]
        expected.add(tuple(tokens[: next(i for i, end in enumerate(ends) if end >= len(text))]))
    assert len(found) == len(set(found))
    assert sum(len(toy.decode(cover)) == len(text) for cover in found) <= 1
    for cover in found:
        assert toy.encode(toy.decode(cover)) == list(cover)
    if longest <= 5:
        assert {cover for cover in found if len(toy.decode(cover)) <= len(text) + longest - 1} >= expected


def byte_level(pattern: str | None, size: int = 420) -> HuggingFaceTokenizer:
    """A byte-level tokenizer behind an expression (None: GPT-2's), trained on Python's own text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    before = tokenizers.pre_tokenizers
    steps = [before.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    if pattern:
        steps = [before.Split(tokenizers.Regex(pattern), behavior="isolated"), *steps]
    tokenizer.pre_tokenizer = before.Sequence(steps)
    alphabet = before.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    text = json.__doc__ + Path(json.__file__).read_text() + SAMPLE * 30
    tokenizer.train_from_iterator([text], trainer)
    return HuggingFaceTokenizer(json.loads(tokenizer.to_str()))


@functools.cache
def cut_tokenizer(name: str) -> HuggingFaceTokenizer:
    return byte_level({"gpt2": None, "llama3": LLAMA3}[name])


TEXTS = [
    "of  x we'll don't I'd  it's\n\n  y 1234 12",
    "é “naïve” — été\u3000\u00a0 x’s привет  мир",
    "  \t\n x='re' 're''ve\r\n \n  ",
]


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_what_may_follow_behind_an_expression(name):
    """All encodings' beginnings are valid, and shapes of tokens decide as the tokens themselves do."""
    tokenizer = cut_tokenizer(name)
    rule = vocabulary_of(tokenizer).rule
    assert isinstance(rule, CutBytePairs)
    rng = np.random.default_rng(0)
    checked = 0
    for text in TEXTS:
        for end in range(1, len(text) + 1):
            tail = ()
            for token in tokenizer.encode(text[:end]):
                assert rule.follow(tail)[0][token], (text[:end], token)
                tail = rule.tail(tail, token)
            raw = b"".join(map(tokenizer.token_bytes, tail))
            mask, ends = rule.follow(tail)
            assert ends
            for token in rng.choice(np.flatnonzero(rule.merges.alone), 30):
                assert mask[token] == rule.valid((*tail, int(token))), (raw, tokenizer.token_bytes(int(token)))
                checked += bool(mask[token])
    assert checked > 100


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_valid_sequences_begin_encodings(name):
    """Against encoding again with each character that may come next, for tokens of whole characters."""
    tokenizer = cut_tokenizer(name)
    rule, again = vocabulary_of(tokenizer).rule, Reencode(tokenizer, looks_ahead=True)
    rng = np.random.default_rng(1)
    ascii_tokens = [i for i in np.flatnonzero(rule.merges.alone) if tokenizer.token_bytes(int(i)).isascii()]
    for text in ("of ", "we'", "I'l", "x  ", "a\n ", "12", " don", "  \n"):
        tail = tuple(tokenizer.encode(text))
        mask, _ = rule.follow(tail)
        for token in rng.choice(ascii_tokens, 40):
            whole = (*tail, int(token))
            spelled = b"".join(map(tokenizer.token_bytes, whole))
            assert mask[token] == again._begins(whole, spelled), (spelled, token)


def test_two_sequences_can_spell_a_text_behind_an_expression():
    """ "of  " is [of][  ], but what begins "of  x" is [of][ ][ x]; both are exact after four bytes."""
    vocabulary = vocabulary_of(cut_tokenizer("gpt2"))
    count = [sum(node == 0 for _, node in vocabulary.covers(b"of  "[:end], 16).open) for end in range(5)]
    assert count[:4] == [1, 1, 1, 1] and count[4] == 2


@given(st.text(st.sampled_from("the of\n日本éx1"), max_size=12), st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_pieces_follow_as_encoding_again_says(text, more):
    """SentencePiece's byte pairs, with bytes for characters without a piece, and inside a character."""
    piece_pairs, again = piece_rules()
    tail, other = (), ()
    raw = text.encode()
    for token in piece_pairs.encode(raw[: max(len(raw) - more, 0)]):
        tail, other = piece_pairs.tail(tail, token), again.tail(other, token)
    for ours, theirs in zip(piece_pairs.follow(tail), again.follow(other)):
        np.testing.assert_array_equal(ours, theirs)


@functools.cache
def piece_rules():
    with np.load(GOLDENS / "official_bpe_dummy_prefix.npz") as file, tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "x.model").write_bytes(file["in/sp_model"].tobytes())
        tokenizer = SentencePieceTokenizer(Path(folder) / "x.model")
    return PiecePairs(tokenizer), Reencode(tokenizer)


# Probabilities.


@functools.cache
def consistent():
    """A token model that a chain over bytes induces, and the truth about prefixes."""
    with np.load(GOLDENS / "numpy_chain_bpe.npz") as file:
        arrays, config = dict(file), json.loads(str(file["config"]))
    toy = Toy(config["vocab"], config["merges"])
    return *induced(config, arrays, toy), toy, arrays


def log_p(arrays, text: bytes) -> float:
    """The log probability of a text by the chain itself, of order 2."""
    symbols = [b"abc".index(letter) for letter in text]
    total = sum(math.log(arrays["in/initial"][symbol]) for symbol in symbols[:2])
    return total + sum(
        math.log(arrays["in/transition"][3 * a + b, c]) for a, b, c in zip(symbols, symbols[1:], symbols[2:])
    )


def test_scores_are_the_chain_rule_wherever_a_prompt_is_cut():
    """P(prompt) times the probabilities of the bytes after it is P(text), for all cuts, as rows of one batch."""
    with jax.enable_x64(True):
        model, params, toy, arrays = consistent()
        text, model_of_bytes = b"abccab", ByteModel.of(opened(model, params, toy))
        cuts = range(len(text))
        scores = model_of_bytes.score([text[cut:] for cut in cuts], [text[:cut] for cut in cuts])
        for cut, score in zip(cuts, scores):
            truth = log_p(arrays, text) - log_p(arrays, text[:cut])
            np.testing.assert_allclose(score.sum(), truth, rtol=0, atol=1e-9)
        (state,) = model_of_bytes.prefill([text[:cut] for cut in cuts])
        for cut in cuts:
            covers = model_of_bytes.mixture.members[0].covers(state, cut)
            np.testing.assert_allclose(
                sum(map(math.exp, covers.values())), math.exp(state.logprob[cut]), rtol=0, atol=1e-12
            )
        np.testing.assert_allclose(np.exp(state.next).sum(-1), 1, rtol=0, atol=1e-12)
        np.testing.assert_allclose(state.next_mass, state.logprob, rtol=0, atol=1e-12)


def test_bytes_as_tokens_are_the_model_itself():
    model = model_of_single_bytes()
    module, (params,) = model.mixture.members[0].model, model.params
    text = "naïve \xff".encode("latin-1")
    logits = jax.jit(module.apply)({"params": params}, jnp.array([[256, *text]]))[0][0]
    following = model.next_bytes([text, text[:2], b"", b"a"])
    np.testing.assert_allclose(following[0], jax.nn.log_softmax(logits[-1]), atol=1e-5)
    np.testing.assert_allclose(following[2], jax.nn.log_softmax(logits[0]), atol=1e-5)


@functools.cache
def small_model():
    tokenizer = cut_tokenizer("gpt2")
    module, params = llama(tokenizer.vocab_size + 6)  # with rows that pad the vocabulary
    return ByteModel.of(opened(module, params, tokenizer))


def test_covers_have_the_probabilities_of_the_model_without_a_cache():
    """The entries of a cache that exact sequences share; rows of unequal prompts, and alone."""
    model = small_model()
    (member,), (params,) = model.mixture.members, model.params
    prompts = [b"import jso", b"", "of  été “".encode()[:-1], b"we'l"]
    (state,) = model.prefill(prompts)
    np.testing.assert_allclose(state.next[0], model.prefill(prompts[:1])[0].next[0], atol=2e-5)

    @jax.jit
    def full_pass(ids):
        return jax.nn.log_softmax(member.model.apply({"params": params}, ids)[0][..., : member.ids])

    for row, prompt in enumerate(prompts):
        chain, _ = member.vocabulary.anchored(prompt)
        covers = sorted(member.covers(state, row).items(), key=lambda item: -item[1])[:6]
        ids = np.zeros((6, 24), np.int32)  # of one shape for all prompts
        ids[:, 0] = model.begins[0][0]
        ids[:, 1 : 1 + len(chain)] = chain
        for number, (cover, _) in enumerate(covers):
            ids[number, 1 + len(chain) : 1 + len(chain) + len(cover)] = cover
        likely = np.asarray(full_pass(ids))
        for number, (cover, value) in enumerate(covers):
            expected = sum(likely[number, len(chain) + i, token] for i, token in enumerate(cover))
            np.testing.assert_allclose(value, expected, atol=1e-4)


def test_steps_equal_a_new_prompt_at_every_byte_and_cost_a_row_a_byte():
    model, text = small_model(), b"def f(x):  return x's  'y'\n\n  # it'l"
    (score,) = model.score([text])
    prompts = [text[:end] for end in range(len(text))]
    assert len(prompts) % 4 == 0  # in batches of four, as in the other tests, nothing is compiled anew
    fresh = np.concatenate([model.next_bytes(prompts[start : start + 4]) for start in range(0, len(prompts), 4)])
    np.testing.assert_allclose(score, fresh[np.arange(len(text)), list(text)], atol=1e-4)
    np.testing.assert_allclose(np.exp(fresh).sum(-1), 1, atol=1e-5)
    (state,) = model.prefill([text])
    assert 0 < state.rows[0] <= state.length[0] + 3


def joined(*models, weights=()):
    """The ensemble of single models, which shares what was compiled for them."""
    members = tuple(member for model in models for member in model.mixture.members)
    params, begins = (sum((getattr(model, name) for model in models), ()) for name in ("params", "begins"))
    return ByteModel(ByteMixture(members=members, weights=weights), params, begins)


@functools.cache
def model_of_single_bytes():
    return ByteModel.of(opened(*llama(257), ByteTokenizer()))


def test_one_model_twice_is_that_model():
    """Ensembles do not depend on the order; weights do what they say."""
    model, other, prompts = small_model(), model_of_single_bytes(), [b"impor", b"x  ", b"", b"we'"]
    ours, theirs = model.next_bytes(prompts), other.next_bytes(prompts)
    np.testing.assert_allclose(joined(model, model, weights=(3, 1)).next_bytes(prompts), ours, atol=1e-5)
    both, turned = joined(model, other, weights=(3, 1)), joined(other, model, weights=(1, 3))
    assert both.mixture.roles == ("eos",)
    np.testing.assert_allclose(both.next_bytes(prompts), turned.next_bytes(prompts), atol=1e-5)
    mean = 0.75 * np.exp(ours[:, :257]) + 0.25 * np.exp(theirs)
    np.testing.assert_allclose(np.exp(both.next_bytes(prompts)), mean, atol=1e-5)
    text = b"we'l"
    (score,) = both.score([text])
    fresh = both.next_bytes([text[:end] for end in range(len(text))])
    np.testing.assert_allclose(score, fresh[np.arange(len(text)), list(text)], atol=1e-4)


def test_weights_of_an_ensemble():
    """No other weights give the bytes a higher probability."""
    scores = np.log(np.random.default_rng(0).dirichlet([0.3] * 5, (3, 200))[..., 0])
    weights = best_weights(scores)
    assert abs(weights.sum() - 1) < 1e-9

    def mean(weights):
        return np.log(weights @ np.exp(scores)).mean()

    others = np.random.default_rng(1).dirichlet(np.ones(3), 500)
    assert mean(weights) >= max(map(mean, others)) > mean(np.full(3, 1 / 3))
    with pytest.raises(ValueError, match="an ensemble needs at least two"):
        ByteEnsembles(models=("smollm2",))
    with pytest.raises(ValueError, match="spans is 0"):
        ByteEnsembles(models=("smollm2", "runs/byte_lm"), spans=0)


# Generation.


@pytest.mark.slow
def test_completions_have_the_distribution_of_the_chain():
    """2,000 prompts at once, each with a cover of its own; frequencies within four standard errors."""
    with jax.enable_x64(True):
        model, params, toy, arrays = consistent()
        byte_model, prompt, count = ByteModel.of(opened(model, params, toy)), b"abc", 2000
        for texts in (
            byte_model.complete([prompt] * count, 3, rng=jax.random.key(0)),
            byte_model.generate([prompt] * count, 3, rng=jax.random.key(1)),
        ):
            for text in map(bytes, itertools.product(b"abc", repeat=2)):
                p = math.exp(log_p(arrays, prompt + text) - log_p(arrays, prompt))
                share = np.mean([made.startswith(text) for made in texts])
                assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / count) + 1e-9, text


def test_covers_and_bytes_have_one_distribution_where_tokens_are_renormalised():
    """All strings of the next two bytes, on a model that leaks to invalid tokens."""
    with jax.enable_x64(True):
        with np.load(GOLDENS / "numpy_policies.npz") as file:
            table, config = file["in/log_probs"], json.loads(str(file["config"]))
        toy = Toy(config["vocab"], config["merges"])
        member = exact(FirstOrder(Config(len(table))), toy, "truncate_renormalize")
        params = jnp.asarray(table)
        prompt, eos = b"abac", toy.eod_id
        state = member.prefill(params, [prompt], [[eos]], new=4)
        chain, _ = member.vocabulary.anchored(prompt)
        total = float(state.logprob[0])

        def spread(tokens, log, found):
            """Adds the probabilities of the two bytes after the prompt."""
            new = toy.decode(tokens)[len(prompt) :][:2]
            if len(new) == 2 or (tokens and tokens[-1] == eos):
                found[new] = found.get(new, 0) + math.exp(log)
                return
            mask, _ = member.vocabulary.rule.follow(tuple(tokens[-1:]))
            row = np.where(mask | (np.arange(len(table)) == eos), np.exp(table[tokens[-1]]), 0)
            for token in np.flatnonzero(row):
                spread([*tokens, int(token)], log + math.log(row[token] / row.sum()), found)

        by_tokens: dict[bytes, float] = {}
        for cover, value in member.covers(state, 0).items():
            spread([*chain, *cover], value - total, by_tokens)
        first, absorb = np.exp(state.next[0]), jax.jit(member.absorb)
        assert abs(by_tokens[b""] - first[256]) < 1e-12
        for letter in b"abc":
            after = absorb(params, state, jnp.array([letter]), jnp.array([True]))
            second = np.exp(after.next[0])
            for other in (*b"abc", 256):
                name = bytes([letter, other]) if other < 256 else bytes([letter])
                np.testing.assert_allclose(by_tokens[name], first[letter] * second[other], rtol=0, atol=1e-12)


def test_completing_takes_drafts_and_streams():
    model, prompts = small_model(), [b"import jso", b"retur"]
    plain = model.complete(prompts, 12, sampling=GREEDY)
    pieces: list[list[bytes]] = [[], []]
    drafted = model.complete(
        prompts,
        12,
        sampling=GREEDY,
        drafter=PromptLookup(tokens=3),
        on_bytes=lambda row, new: pieces[row].append(new),
    )
    assert drafted == plain == [b"".join(new) for new in pieces]


@pytest.mark.slow
def test_drafters_keep_their_states():
    model, prompts = small_model(), [b"import jso", b"retur"]
    plain = model.complete(prompts, 12, sampling=GREEDY)
    ended: list[Generation] = []
    recycling = TokenRecycling(template=TreeTemplate.chain(3))
    options = {"sampling": GREEDY, "drafter": recycling, "on_end": ended.append}
    assert model.complete(prompts, 12, **options) == plain
    assert model.complete(prompts, 12, drafter_state=ended[0].state.drafter, **options) == plain
    assert max(ended[1].steps) < max(ended[0].steps)


@pytest.mark.slow
def test_generation_byte_by_byte():
    """Its log probabilities are the scores of its bytes; `generate_exact` is `complete`."""
    model, prompts = small_model(), [b"import jso", b"retur"]
    plain = model.complete(prompts, 12, sampling=GREEDY)
    (member,), (params,) = model.mixture.members, model.params
    source = opened(member.model, params, member.vocabulary.tokenizer)
    assert generate_exact(source, prompts, 12, temperature=0) == plain
    made, logprobs = model.generate(prompts, 6, sampling=GREEDY, logprobs=True)
    scores = model.score([text or b" " for text in made], prompts)
    for text, numbers, score in zip(made, logprobs, scores):
        if text:
            np.testing.assert_allclose(numbers[: len(text)], score, atol=1e-4)


def test_gaps():
    """In both orders the middle goes on inside a token; psm moves the bytes after the last safe boundary."""
    model = small_model()
    ids = [model.mixture.members[0].vocabulary.tokenizer.encode(text)[0] for text in "<>|"]
    for order in ("psm", "spm"):
        gap = Gap(*ids, order=order)
        prompts, contexts = model.gap_prompts([b"import jso"], [b"\nx = 1"], gap)
        assert b"import jso".endswith(prompts[0]) and b"jso" in prompts[0]
        assert contexts[0].count(gap.middle) == 1
        (state,) = model.prefill(prompts, contexts=[contexts])
        assert abs(np.exp(state.next[0]).sum() - 1) < 1e-5
        (middle,) = model.fill([b"import jso"], [b"\nx = 1"], gap, 4, sampling=GREEDY)
        drafter = PromptLookup(tokens=3)
        assert middle and [middle] == model.fill(
            [b"import jso"], [b"\nx = 1"], gap, 4, sampling=GREEDY, drafter=drafter
        )
    with pytest.raises(ValueError, match="order is 'mps'"):
        Gap(1, 2, 3, order="mps")


def test_text_in_the_domain_of_bytes_with_sentencepiece(tmp_path):
    """A space is one byte; a character without a piece is spelled in bytes."""
    with np.load(GOLDENS / "official_bpe_dummy_prefix.npz") as file:
        (tmp_path / "x.model").write_bytes(file["in/sp_model"].tobytes())
    tokenizer = SentencePieceTokenizer(tmp_path / "x.model")
    module, params = llama(tokenizer.vocab_size)
    model = ByteModel.of(opened(module, params, tokenizer, begin=(1,)))
    text = "the 日▁ é"
    (score,) = model.score([text])
    assert np.isfinite(score).all() and len(score) == len(text.encode())
    (state,) = model.prefill(["日".encode()[:1]], new=64)
    assert state.next.argmax(-1) > 127  # only the rest of a character
    with pytest.raises(ValueError, match="not UTF-8"):
        model.next_bytes([b"\xff"])


# What is refused.


def test_bad_input():
    model = model_of_single_bytes()
    source = opened(model.mixture.members[0].model, model.params[0], ByteTokenizer())
    with pytest.raises(ValueError, match="policy is 'drop'; it must be one of"):
        ByteModel.of(source, policy="drop")
    with pytest.raises(ValueError, match="slots is -1"):
        ByteModel.of(source, slots=-1)
    with pytest.raises(ValueError, match="domain is 'word'"):
        ByteModel.of(source, domain="word")
    with pytest.raises(ValueError, match="validity is 'x'"):
        ByteModel.of(source, validity="x")
    with pytest.raises(ValueError, match="members is empty"):
        ByteMixture(members=())
    with pytest.raises(ValueError, match="weights is"):
        ByteModel.of(source, weights=(1, 2))
    with pytest.raises(ValueError, match="has 100 ids, and its tokenizer 257"):
        ByteModel.of(opened(*llama(100), ByteTokenizer()))
    with pytest.raises(ValueError, match="there is no text"):
        model.next_bytes([])
    with pytest.raises(ValueError, match="nothing comes before prompt 0"):
        dataclasses.replace(model, begins=((),)).next_bytes(["a"])
    with pytest.raises(ValueError, match="a prompt has 201 tokens; the model's max_length is 160"):
        model.next_bytes(["a" * 201])
    with pytest.raises(ValueError, match="text 0 has 201 tokens"):
        model.score(["a" * 200])
    with pytest.raises(ValueError, match="max_bytes is 0"):
        model.generate(["a"], 0, sampling=GREEDY)
    with pytest.raises(ValueError, match="max_bytes = 160"):
        model.generate(["a"], 160, sampling=GREEDY)
    with pytest.raises(ValueError, match="rng is None"):
        model.generate(["a"], 2)
    with pytest.raises(ValueError, match="2 prompts"):
        model.score(["a"], ["b", "c"])
    broken = dataclasses.replace(model, params=(jax.tree.map(lambda x: x * jnp.nan, model.params[0]),))
    with pytest.raises(ValueError, match="NaN"):
        broken.next_bytes(["a"] * 4)
    with pytest.raises(ValueError, match="an ensemble has no tokens"):
        ByteModel.of(source, source).complete(["a"], 2, sampling=GREEDY)


def test_bytes_without_tokens():
    """A byte that no token begins with has probability 0; a score says where it is."""
    toy = Toy("abc", [])
    table = np.log(np.full((4, 4), 0.25))
    model = ByteModel.of(opened(FirstOrder(Config(4)), jnp.asarray(table), toy))
    assert b"d" in model.mixture.members[0].vocabulary.lacking
    assert np.isneginf(model.next_bytes(["ab"])[0, ord("d")])
    with pytest.raises(ValueError, match="a character is missing"):
        model.score(["abd"])
    with pytest.raises(ValueError, match="no tokens of the vocabulary cover prompt 1, which ends in b'ad'"):
        model.next_bytes(["ab", "ad"])
    with pytest.raises(ValueError, match="more than 1 token sequences are open after b'b'; give more slots"):
        ByteModel.of(opened(FirstOrder(Config(4)), jnp.asarray(table), toy), slots=1).next_bytes(["ab"])


def test_a_tokenizer_that_changes_texts_is_refused():
    class Lower(ByteTokenizer):
        name = "lower"

        def encode(self, text):
            return super().encode(text.lower())

    with pytest.raises(ValueError, match="the tokenizer lower turns 'A' into 'a'"):
        vocabulary_of(Lower())


def test_incomplete_characters():
    assert [incomplete("a日".encode()[:end]) for end in range(5)] == [0, 0, 1, 2, 0]
    assert set("a1 \n\t'") <= set(LOOKAHEAD)
    assert ExactBytes is not None


@pytest.mark.slow
def test_cuts_of_a_real_model(tmp_path):
    """SmolLM2 on HumanEval's prompts: exact bytes need fewer bits than token healing, and that than the plain way."""
    study = ByteCuts(begin=(0,), prompts=16, cuts=2, workdir=str(tmp_path))
    assert study.run()
    rows = [json.loads(line) for line in (tmp_path / "cuts.jsonl").read_text().splitlines()]
    assert len(rows) == 32
    plain, healed, exact_bytes = (np.mean([row[how] for row in rows]) for how in ("plain", "healed", "exact"))
    assert exact_bytes < healed < plain
    assert sum(row["rows"] for row in rows) <= 1.05 * sum(row["bytes"] for row in rows)
    done = (tmp_path / "cuts.jsonl").read_text()
    assert study.run() and (tmp_path / "cuts.jsonl").read_text() == done  # it goes on where it was stopped
