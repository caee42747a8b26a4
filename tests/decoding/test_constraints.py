"""Constraints in generation: what is allowed, for any tokenizer, in batches, with drafts, by masks or one by one."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_lms import LLAMA, noisy_params

from jaxtok.decoding import Engine, PromptLookup, Sampling, generate
from jaxtok.decoding.constraints import Constrained, Function, Grammar, Vocabulary, constrain, constraint
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.llama import LlamaConfig
from jaxtok.protocols import Special
from jaxtok.tokenizers.byt5 import ByT5Tokenizer
from jaxtok.tokenizers.bytes import ByteTokenizer


class Pieces:
    """A tokenizer of bytes and some longer pieces, one of which ends inside a character; two tokens end texts."""

    name = "pieces"
    extra = (b"ab", b"bab", b'{"', b'":', b'": ', b'"}', b"tr", b"ue", b"\xc3", b"12", b" the", "é".encode(), b"", b"")
    vocab_size = 256 + len(extra)
    eod_id = vocab_size - 1
    special = Special(eos=(vocab_size - 1, vocab_size - 2))

    def token_bytes(self, token):
        return bytes([token]) if token < 256 else self.extra[token - 256]

    def encode(self, text):
        return list(text.encode() if isinstance(text, str) else text)

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids))


@pytest.fixture(scope="module")
def llguidance():
    return pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def pieces():
    return Vocabulary(Pieces())


@pytest.fixture(scope="module")
def tiny():
    model = Decoder(
        LlamaConfig(**LLAMA | {"num_layers": 1, "vocab_size": 288, "max_length": 64})
    )  # a padded vocabulary
    return model, noisy_params(model)


SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}, "b": {"enum": [1, 2]}},
    "required": ["a", "b"],
    "additionalProperties": False,
}
TEXTS = {
    "(ab){2,3}": lambda text: re.fullmatch(rb"(ab){2,3}", text),
    "[0-9]{3}( the)?": lambda text: re.fullmatch(rb"[0-9]{3}( the)?", text),
    "é|è": lambda text: text.decode() in ("é", "è"),
}
PROMPTS = [[97, 98, 97, 98], [5], [49, 50, 51, 49, 50, 51, 49, 50]]


def run(tiny, pieces, chooser, grammars, new=16, drafter=None, prompts=PROMPTS):
    model, params = tiny
    return generate(
        model,
        params,
        prompts,
        max_new_tokens=new,
        chooser=chooser,
        drafter=drafter,
        rng=jax.random.key(1),
        stop_tokens=pieces.eos,
        chooser_state=chooser.start(grammars),
    )


def test_batches_of_unequal_prompts_each_with_its_own_constraint(tiny, pieces, llguidance):
    """Every finished text is valid; with drafts, by masks or one by one, it is the same text."""
    grammars = [Grammar("regex", expression) for expression in TEXTS]
    chooser = Constrained(vocabulary=pieces)
    plain = run(tiny, pieces, chooser, grammars)
    for tokens, valid in zip(plain.tokens, TEXTS.values()):
        assert tokens[-1] in pieces.eos
        assert valid(Pieces().decode(tokens)), tokens
    drafted = run(tiny, pieces, chooser, grammars, drafter=PromptLookup(tokens=4))
    assert drafted.tokens == plain.tokens
    for ours, expected in zip(drafted.logprobs, plain.logprobs):
        np.testing.assert_allclose(ours, expected, atol=1e-5)
    one_by_one = Constrained(vocabulary=pieces, mask=False, block=5)
    assert run(tiny, pieces, one_by_one, grammars, drafter=PromptLookup(tokens=4)).tokens == plain.tokens


@pytest.mark.slow
def test_greedy_alone_and_in_parts(tiny, pieces, llguidance):
    grammars, greedy = [Grammar("regex", expression) for expression in TEXTS], Sampling(temperature=0)
    chooser = Constrained(vocabulary=pieces, sampling=greedy)
    plain = run(tiny, pieces, chooser, grammars)
    drafted = run(tiny, pieces, chooser, grammars, drafter=PromptLookup(tokens=4))
    one_by_one = run(tiny, pieces, Constrained(vocabulary=pieces, sampling=greedy, mask=False, block=5), grammars)
    assert plain.tokens == drafted.tokens == one_by_one.tokens
    alone = run(tiny, pieces, chooser, grammars[:1], prompts=PROMPTS[:1])
    assert alone.tokens[0] == plain.tokens[0]
    # The state of a chooser continues a text.
    first = run(tiny, pieces, chooser, grammars, new=2)
    model, params = tiny
    rest = generate(
        model,
        params,
        [prompt + tokens for prompt, tokens in zip(PROMPTS, first.tokens)],
        max_new_tokens=14,
        chooser=chooser,
        stop_tokens=pieces.eos,
        chooser_state=first.state.chooser,
    )
    for start, tokens, expected in zip(first.tokens, rest.tokens, plain.tokens):
        assert [*start, *tokens] == expected


def test_one_compiled_program_serves_all_constraints(tiny, pieces, llguidance):
    chooser = Constrained(vocabulary=pieces, sampling=Sampling(temperature=0))
    sizes: list[tuple[int, int]] = []
    for expression in ("a+b", "[0-4]{5}", "x|y"):
        done = run(tiny, pieces, chooser, [Grammar("regex", expression)] * 3, new=6)
        sizes.append((Engine._run._cache_size(), Engine._prefill._cache_size()))
        text = Pieces().decode(done.tokens[1])
        assert re.fullmatch(expression.encode(), text) or len(done.tokens[1]) == 6
    assert len(set(sizes)) == 1


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), ByT5Tokenizer(), Pieces()], ids=lambda t: t.name)
def test_constraints_by_a_text(tokenizer, llguidance, tmp_path):
    """Masks equal what a walk through the tokens says, for each tokenizer."""
    grammar = tmp_path / "sum.lark"
    grammar.write_text('start: number ("+" number)*\nnumber: /[0-9]+/\n')
    texts = {
        "regex:(ab)+c?": ([b"abab", b"ababc"], [b"aba", b"abcc", b""]),
        f"json:{json.dumps(SCHEMA)}": ([b'{"a": true, "b": 2}'], [b'{"a": true, "b": 3}', b'{"a": true']),
        f"grammar:{grammar}": ([b"1", b"12+3"], [b"12+", b"+"]),
    }
    vocabulary = Vocabulary(tokenizer)
    for text, (good, bad) in texts.items():
        rule = constraint(text)
        assert [vocabulary.follow(rule, tokenizer.encode(each)) for each in good] == [0.0] * len(good)
        assert [vocabulary.follow(rule, tokenizer.encode(each)) for each in bad] == [-np.inf] * len(bad)
        state = rule.start(vocabulary)
        for token in tokenizer.encode(good[0])[:3]:
            mask = np.array([bool(vocabulary.tokens[i]) and rule.allows(state, i) for i in range(tokenizer.vocab_size)])
            known = vocabulary.known.copy()
            known[list(vocabulary.eos)] = False
            np.testing.assert_array_equal(rule.mask(state)[: len(mask)] & known, mask)
            state = rule.advance(state, token)
        chooser = constrain(text, tokenizer, Sampling(temperature=0))
        logits = jnp.zeros((1, tokenizer.vocab_size + 5))
        token, _ = chooser.choose(logits, jax.random.split(jax.random.key(0), 1), chooser.init(1))
        assert vocabulary.tokens[int(token[0])][:1] in (good[0][:1], b"0")


def test_python_functions(tiny, pieces):
    """A function of bytes; by masks and one by one; where it leaves no token, the row ends with a warning."""
    few = Function(lambda text, complete: text.count(b"a") <= 2 and (not complete or len(text) >= 6))
    plain, other = (
        run(tiny, pieces, Constrained(vocabulary=pieces, mask=mask), [few] * 3, new=12) for mask in (True, False)
    )
    assert plain.tokens == other.tokens
    assert all(Pieces().decode(tokens).count(b"a") <= 2 for tokens in plain.tokens)
    short = Function(lambda text, complete: len(text) <= 2 and not complete)
    for mask in (True, False):
        with pytest.warns(UserWarning, match="no token is allowed next in rows"):
            dead = run(tiny, pieces, Constrained(vocabulary=pieces, mask=mask), [short] * 3, new=12)
            jax.effects_barrier()
        assert all(tokens[-1] == pieces.eos[0] and len(Pieces().decode(tokens)) == 2 for tokens in dead.tokens)


def test_bad_input(tiny, pieces, llguidance, tmp_path):
    for text, said in {
        "regex:(": "cannot be used.*unclosed group",
        "json:{": "is no JSON",
        'json:{"type": "foo"}': "Invalid type",
        'json:{"enum": []}': "Unsatisfiable",
        "regex": "must be regex:EXPRESSION",
        "gbnf:x": "must be regex:EXPRESSION",
    }.items():
        with pytest.raises(ValueError, match=said):
            constrain(text, ByteTokenizer())
    with pytest.raises(FileNotFoundError, match="there is no file"):
        constrain("grammar:nowhere.lark", ByteTokenizer())
    with pytest.raises(ValueError, match="top_k and top_p need the mask"):
        Constrained(vocabulary=pieces, sampling=Sampling(top_p=0.9), mask=False)
    with pytest.raises(ValueError, match="has no constraint"):
        Constrained(vocabulary=pieces).init(1)
    with pytest.raises(ValueError, match="eos is"):
        Vocabulary(ByteTokenizer(), eos=[999])
    other = Vocabulary(Pieces())
    chooser, foreign = Constrained(vocabulary=pieces), Constrained(vocabulary=other)
    with pytest.raises(ValueError, match="of another vocabulary"), pieces.errors():
        model, params = tiny
        generate(
            model,
            params,
            PROMPTS[:1],
            max_new_tokens=3,
            chooser=chooser,
            rng=jax.random.key(0),
            chooser_state=foreign.start([Grammar("regex", "never seen by the other")]),
        )


def test_rows_can_be_moved(pieces, llguidance):
    """The state of a row is arrays: it can be gathered and repeated."""
    place = pieces.start([Grammar("regex", "ab"), Grammar("regex", "cd")])
    place = pieces.mask(place.then(jnp.array([97, 99])), 288)[1]
    swapped = jax.tree.map(lambda x: x[jnp.array([1, 0, 1])], place)
    allowed, _ = pieces.mask(swapped, 288)
    assert [np.flatnonzero(row).tolist() for row in allowed] == [[100], [98], [100]]
