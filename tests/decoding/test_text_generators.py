"""What every task that continues text in its own way promises (`jaxtok.protocols.TextGenerator`)."""

from __future__ import annotations

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtok.decoding import Sampling
from jaxtok.lm import t5, word_pooled
from jaxtok.lm.decoder import init_params
from jaxtok.lm.hat import HAT, HATConfig, HATModeling
from jaxtok.lm.hat_released import ReleasedConfig, ReleasedHAT, ReleasedModeling
from jaxtok.lm.mrt5 import MrT5Training, mrt5
from jaxtok.lm.t5 import SequenceToSequence, byt5
from jaxtok.lm.word_pooled import WordPooledConfig, WordPooling
from jaxtok.nn.linear import LlamaStack
from jaxtok.protocols import TextGenerator

CHAR = LlamaStack(num_layers=1, d_model=16, num_heads=2, mlp_dim=24)
BIDIRECTIONAL = LlamaStack(num_layers=1, d_model=16, num_heads=2, mlp_dim=24, causal=False)
WORDS = {"d_model": 16, "num_layers": 1, "num_heads": 2, "unit_layers": 1, "encoder_heads": 2, "encoder_mlp_dim": 16}
BYT5 = byt5(16, 24, 1, 1, 2)
MRT5 = mrt5(BYT5, gate_layer=0)
WORD = jnp.zeros((1, 1, 6), jnp.int32)


def hat():
    config = HATConfig(
        encoder=BIDIRECTIONAL, backbone=CHAR, decoder=CHAR, max_units=6, alphabet=258, w_id=256, s_id=257
    )
    return HATModeling(model=config), lambda key: init_params(HAT(config), key, WORD, WORD[..., 0], WORD)


def released_hat():
    config = ReleasedConfig(
        encoder=CHAR, backbone=CHAR, decoder=CHAR, connector_heads=2, guide_heads=2, max_word_size=6
    )
    return ReleasedModeling(model=config), lambda key: init_params(ReleasedHAT(config), key, *[WORD[:, 0]] * 3)


def learn_your_tokens():
    config = WordPooledConfig(**WORDS, prefixes=2, max_words=12, max_units=6, dropout=0.0, encoder_dropout=0.0)
    return WordPooling(model=config), lambda key: word_pooled.init_params(config, key)


GENERATORS = {
    "hat": hat,
    "released hat": released_hat,
    "learn your tokens": learn_your_tokens,
    "byt5": lambda: (SequenceToSequence(model=BYT5), lambda key: t5.init_params(BYT5, key)),
    "mrt5": lambda: (MrT5Training(model=MRT5), lambda key: t5.init_params(MRT5, key)),
}
LIKE_ANOTHER = ("mrt5", "released hat")
"""Their own test files generate with them too, and what these share with another is tested with that one."""
PROMPTS = [b"one two", b"a b c d e f", "naïve".encode()]
MOST = 23


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_ANOTHER)) for name in GENERATORS],
)
def continued(request):
    task, init = GENERATORS[request.param]()

    @jax.jit
    def noisy(key):
        flat, unflatten = jax.flatten_util.ravel_pytree(init(key))
        return unflatten(flat + 0.3 * jax.random.normal(key, flat.shape))

    params = noisy(jax.random.key(0))

    def run(prompts=PROMPTS, **options):
        given = {"max_bytes": MOST, "sampling": Sampling(), "rng": jax.random.key(2)}
        return task.continue_text(params, prompts, **given | options)

    assert isinstance(task, TextGenerator)
    return run


@pytest.mark.parametrize("sampling", [Sampling(temperature=0), Sampling(temperature=1.3, top_p=0.9)], ids=["0", "1.3"])
def test_streamed_and_with_log_probabilities_it_is_the_same_text(continued, sampling):
    texts = continued(sampling=sampling)
    assert all(isinstance(text, bytes) and len(text) <= MOST for text in texts) and any(texts)
    pieces = []
    again, logprobs = continued(sampling=sampling, on_text=pieces.append, logprobs=True)
    assert again == texts == [b"".join(new) for new in zip(*pieces)]
    assert len(pieces) > 1 or max(map(len, texts)) < 16
    for text, row in zip(texts, logprobs):
        assert len(row) >= min(1, len(text)) and np.isfinite(row).all() and max(row, default=0) <= 0


def test_the_key_and_the_number_of_a_row_decide(continued):
    texts = continued()
    assert texts == continued() != continued(rng=jax.random.key(3))
    other = continued([PROMPTS[0], b"zzz yyyyyy", PROMPTS[2]])
    assert [other[0], other[2]] == [texts[0], texts[2]] and other[1] != texts[1]
    assert continued(PROMPTS[:1]) == texts[:1]


def test_what_is_refused(continued):
    with pytest.raises(ValueError, match="rng is None"):
        continued(rng=None)
    with pytest.raises(ValueError, match=r"there (is no|are 0) (prompt|input)"):
        continued([])
