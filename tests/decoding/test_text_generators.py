"""What every task that continues text in its own way promises (`jaxtok.protocols.TextGenerator`)."""

from __future__ import annotations

import jax
import jax.flatten_util
import numpy as np
import pytest
from collector import collect

from jaxtok.decoding import Sampling
from jaxtok.protocols import TextGenerator

GENERATORS = collect("TEXT_GENERATORS")
LIKE_ANOTHER = ("mrt5", "hat_released")
"""Their own test files generate with them too, and what these share with another is tested with that one."""
PROMPTS = [b"one two", b"a b c d e f", "naïve".encode()]
MOST = 23


def test_every_text_generator_is_here():
    tasks = {type(make().task) for make in collect("TASKS").values()}
    assert {kind for kind in tasks if hasattr(kind, "continue_text")} == {
        type(make()[0]) for make in GENERATORS.values()
    }


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
