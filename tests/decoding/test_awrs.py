"""Adaptive weighted rejection sampling: the authors' runs, exact expectations, and evidence of a model's texts."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from causal_lms import LLAMA, noisy_params

from jaxtok.decoding.awrs import AWRS, PRESETS, SMC, RandomNoise, Sampler, resample, sample_texts
from jaxtok.decoding.constraints import Function, Visited, Vocabulary
from jaxtok.lm.decoder import Decoder
from jaxtok.lm.llama import LlamaConfig
from jaxtok.protocols import Special

EVIDENCE = {"awrs": {"generate, cached": "decoding/test_awrs.py::test_evidence_is_unbiased"}}

ESTIMATORS = {"improper": "local", "proper": "auto"}


@dataclasses.dataclass(frozen=True)
class Symbols:
    """A tokenizer whose token i is the byte i; the last one ends texts."""

    vocab_size: int
    name = "symbols"

    @property
    def eod_id(self):
        return self.vocab_size - 1

    @property
    def special(self):
        return Special(eos=(self.eod_id,))

    def token_bytes(self, token):
        return b"" if token == self.eod_id else bytes([token])

    def encode(self, text):
        return list(text)

    def decode(self, ids):
        return b"".join(map(self.token_bytes, ids))


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Noise that the authors' code drew: uniforms [batch, rounds, vocab], phantoms [batch, draws]."""

    uniforms: jax.Array
    draws: jax.Array

    def gumbel(self, rounds, vocab):
        rows = jnp.arange(len(rounds))
        return -jnp.log(-jnp.log(self.uniforms[rows, jnp.minimum(rounds, self.uniforms.shape[1] - 1)]))

    def phantoms(self, number, log_rejected):
        number = jnp.minimum(number, self.draws.shape[1] - 1)
        return jnp.take_along_axis(self.draws, number, 1).astype(log_rejected.dtype)


@dataclasses.dataclass
class Listed:
    """A constraint that allows the tokens of a table, and remembers what it was asked."""

    accept: np.ndarray
    name: str
    masks = False

    def __post_init__(self):
        self.asked = []

    def start(self, vocabulary):
        self.eos = vocabulary.eos[0]
        return ()

    def allows(self, state, token):
        self.asked.append(token)
        return bool(self.accept[token])

    def score(self, state, complete):
        if complete:
            self.asked.append(self.eos)
        return 0.0 if not complete or self.accept[self.eos] else -np.inf


def limits(case) -> dict:
    return {"max_accepts": case["max_accepts"], "max_rejects": case["max_rejects"] or 0}


@pytest.mark.parity("awrs/official_single_token*.npz")
def test_tokens(golden, parity):
    """The three algorithms, with the authors' random numbers."""
    for number, case in enumerate(golden.config["cases"]):
        logps, accept = golden[f"in/{number}_logps"], golden[f"in/{number}_accept"]
        runs, vocab = logps.shape
        vocabulary = Vocabulary(Symbols(vocab + 1))
        tables = [Listed(row, f"{number} {run}") for run, row in enumerate(accept)]
        phantoms = golden.arrays.get(f"in/{number}_phantoms", np.zeros((runs, 1)))
        estimator = ESTIMATORS.get(case["algorithm"], case["algorithm"])
        for block in (64, 3) if number == 7 else (64,):
            sampler = AWRS(estimator=estimator, block=block, **limits(case))
            with jax.enable_x64(True):
                noise = Recorded(jnp.asarray(golden[f"in/{number}_uniforms"]), jnp.asarray(phantoms))
                place = vocabulary.start(tables)
                for table in tables:
                    table.asked.clear()
                drawn = jax.jit(lambda logps: sampler.sample(logps, noise, place, vocabulary.visit))(jnp.asarray(logps))  # noqa: B023
            np.testing.assert_array_equal(drawn.tokens, golden[f"out/{number}_token"], f"{case} {block}")
            expected = golden[f"out/{number}_logw"]
            np.testing.assert_array_equal(np.isfinite(drawn.log_weights), np.isfinite(expected))
            finite = np.isfinite(expected)
            if finite.any():
                parity(f"{number} log W", drawn.log_weights[finite], expected[finite], 1e-9)
            if block == 64:  # afterwards, the vocabulary knows them
                for table, checked, count in zip(
                    tables, golden[f"out/{number}_checked"], golden[f"out/{number}_n_checks"]
                ):
                    assert table.asked == checked[:count].tolist(), (case, table.name)
                np.testing.assert_array_equal(drawn.checks, golden[f"out/{number}_n_checks"])


@pytest.mark.parity("awrs/official_token_sampler*.npz")
def test_token_sampler(golden, parity):
    """The choice of the algorithm, tokens of the model that the constraint does not know, and a proposal."""
    groups = {}
    for number, case in enumerate(golden.config["cases"]):
        groups.setdefault(tuple(limits(case).items()), []).append((number, case))
    width = 1 + max(case["V"] for case in golden.config["cases"])
    vocabulary = Vocabulary(Symbols(width))

    def padded(x, value, shape):
        return np.pad(x, [(0, n - m) for n, m in zip(shape, x.shape)], constant_values=value)

    for group in groups.values():
        arrays, targets = {"logits": [], "accept": [], "uniforms": [], "phantoms": []}, []
        for number, case in group:
            target, accept = golden[f"in/{number}_logw"], golden[f"in/{number}_accept"].copy()
            unknown = np.arange(len(target)) >= case["known"]
            unknown[-1] = False
            accept[unknown] = False
            logits = golden.arrays.get(f"in/{number}_proposal_logw", target)
            logits = np.where(unknown, -np.inf, logits) if case["prune"] else logits
            targets.append((target, logits))
            arrays["logits"].append(padded(logits, -np.inf, [width]))
            arrays["accept"].append(padded(accept, 0, [width]))
            arrays["uniforms"].append(padded(golden[f"in/{number}_uniforms"], 0.5, [4, width]))
            arrays["phantoms"].append(padded(golden[f"in/{number}_phantoms"], 0, [32]))
        stacked = {name: np.stack(each) for name, each in arrays.items()}
        with jax.enable_x64(True):
            noise = Recorded(jnp.asarray(stacked["uniforms"]), jnp.asarray(stacked["phantoms"]))
            tables = [Listed(row, str(number)) for row, (number, _) in zip(stacked["accept"], group)]
            place, sampler = vocabulary.start(tables), AWRS(**limits(group[0][1]))
            drawn = jax.jit(lambda logits: sampler.sample(logits, noise, place, vocabulary.visit))(  # noqa: B023
                jnp.asarray(stacked["logits"])
            )
        for row, ((number, case), (target, logits)) in enumerate(zip(group, targets)):
            token, expected = int(drawn.tokens[row]), float(golden[f"out/{number}_logw"])
            assert token == golden[f"out/{number}_token"], case
            weight = float(drawn.log_weights[row])
            if np.isfinite(expected):
                parity(f"{number} log W", weight + target[token] - logits[token], expected, 1e-9)
            else:
                assert weight == -np.inf, case


@pytest.mark.parity("awrs/official_resampling*.npz")
def test_resampling(golden):
    ancestors_of = jax.jit(resample, static_argnames="method")
    for number in range(len(golden.config["cases"])):
        weights = golden[f"in/{number}_weights"]
        for method in ("multinomial", "stratified", "systematic", "residual"):
            uniforms = golden[f"in/{number}_{method}_uniforms"]
            with jax.enable_x64(True):
                uniforms = jnp.pad(jnp.asarray(uniforms), (0, len(weights) - len(uniforms)))
                ancestors = ancestors_of(jnp.asarray(weights), uniforms, method=method)
            np.testing.assert_array_equal(ancestors, golden[f"out/{number}_{method}"], f"{method} {number}")


@dataclasses.dataclass(frozen=True)
class Bigrams:
    """A model whose parameters are its log probabilities, by the previous token; the last row begins texts."""

    def step(self, params, tokens, state, live):
        return params[tokens], state, live

    def take(self, state, rows):
        return state


@dataclasses.dataclass
class Automaton:
    delta: np.ndarray
    final: np.ndarray
    name = "automaton"
    masks = False

    def start(self, vocabulary):
        return 0

    def allows(self, state, token):
        return token < self.delta.shape[1] and self.delta[state, token] >= 0

    def advance(self, state, token):
        return int(self.delta[state, token]) if self.allows(state, token) else None

    def score(self, state, complete):
        return 0.0 if not complete or self.final[state] else -np.inf


@pytest.mark.parity("awrs/official_smc_*.npz")
def test_smc(golden, parity):
    """The authors' runs, step by step: their tokens and tokens' weights, and what follows from these."""
    config, eos = golden.config, golden.config["eos"]
    count, bonus = config["n_particles"], config["critic_length_bonus"]
    vocabulary, table = Vocabulary(Symbols(eos + 1)), golden.arrays.get("in/critic_weights")
    options = SMC(
        particles=count,
        ess_threshold=config["ess_threshold"],
        resampling=config["resampling"],
        awrs=AWRS(estimator=ESTIMATORS[config["algorithm"]], **limits(config)),
    )
    sampler = Sampler(model=Bigrams(), vocabulary=vocabulary, options=options, max_tokens=config["max_tokens"])
    if config["proposal"]:
        sampler = dataclasses.replace(sampler, proposal=Bigrams())

    def critic(text, complete):
        return float(sum(table[byte] for byte in text) + (bonus * len(text) if complete else 0))

    weigh, again, draw = jax.jit(sampler.weigh), jax.jit(sampler.resample), jax.jit(sampler.draw)
    arrive = jax.jit(lambda place, live: vocabulary.scores(place, live)[2])
    many, every = [Automaton(golden["in/delta"], golden["in/final"])] * count, []
    for run in range(config["runs"]):
        at = functools.partial(lambda run, name: golden[f"mid/{run}_{name}"], run)
        with jax.enable_x64(True):
            params = tuple(
                None if (logs := golden.arrays.get(f"in/{name}")) is None else jnp.asarray(logs)
                for name in ("log_probs", "proposal_log_probs")
            )
            particles = sampler.begin(
                (),
                jnp.full(count, eos),
                jax.random.key(0),
                vocabulary.start(many),
                vocabulary.start([Function(critic, critic=True)] * count) if config["critic"] else None,
                (),
            )
            for step, tokens in enumerate(at("token")):
                expected = at("logw_sample")[step]
                forced = step == config["max_tokens"] - 1
                if forced:
                    drawn, token, weight = draw(params, particles, particles.keys)
                    np.testing.assert_array_equal(token[tokens >= 0], tokens[tokens >= 0])
                else:
                    live = jnp.asarray(tokens >= 0)
                    place = particles.place.then(jnp.where(live, tokens, -1))
                    particles = particles.replace(place=arrive(place, live))
                    drawn, token, weight = particles, jnp.asarray(tokens), jnp.asarray(expected)
                particles = weigh(drawn, token, weight)
                every.append((particles.log_weights, at("weight_before")[step]))
                np.testing.assert_array_equal(~particles.live, at("finished")[step].astype(bool))
                alive = np.isfinite(at("twist")[step])
                np.testing.assert_allclose(particles.twist[alive], at("twist")[step][alive], atol=1e-9)
                uniforms = np.nan_to_num(golden[f"in/{run}_resample_uniforms"][step])
                uniforms = jnp.pad(jnp.asarray(uniforms), (0, count - len(uniforms)))
                particles, (ess, low, ancestors) = again(particles, uniforms)
                assert bool(low[0]) == bool(at("resampled")[step])
                if low[0]:
                    np.testing.assert_array_equal(ancestors[0], at("ancestors")[step])
                if np.isfinite(at("weight_before")[step]).any():
                    parity(f"run {run} ESS", ess[0], at("ess")[step], 1e-9)
                every.append((particles.log_weights, at("weight_after")[step]))
        every.append((particles.log_weights, golden[f"out/{run}_log_weights"]))
        for text, length, expected in zip(particles.text, particles.length, golden[f"out/{run}_tokens"]):
            assert text[:length].tolist() == expected[expected >= 0].tolist()
        evidence = np.exp(np.asarray(particles.log_weights)).mean()
        parity(f"run {run} evidence", evidence, np.exp(golden[f"out/{run}_log_ml"]), 1e-9)
    ours, reference = map(np.concatenate, zip(*every))
    np.testing.assert_array_equal(np.isfinite(ours), np.isfinite(reference))
    finite = np.isfinite(reference)
    parity("log weights", ours[finite], reference[finite], 1e-9)


# Exact expectations.


@dataclasses.dataclass(frozen=True)
class Orders:
    """Noise that makes rows visit their tokens in given orders, one a round."""

    logp: jax.Array
    orders: jax.Array

    def gumbel(self, rounds, vocab):
        rows = jnp.arange(len(rounds))
        rank = jnp.argsort(self.orders[rows, jnp.minimum(rounds, self.orders.shape[1] - 1)], -1)
        return -rank.astype(self.logp.dtype) - self.logp

    def phantoms(self, number, log_rejected):
        raise AssertionError("not needed")


def table_visit(accept):
    """`Vocabulary.visit` for a table [batch, vocab], on the device."""

    def visit(place, tokens, limit, next_too):
        rows, block = jnp.arange(len(limit)), next_too.shape[1]
        allowed = jnp.take_along_axis(accept, tokens, 1)
        fits = allowed[:, :block] & (jnp.arange(block) < limit[:, None])
        found, first = fits.any(-1), jnp.argmax(fits, -1)
        too = found & next_too[rows, first]
        last = allowed[rows, jnp.minimum(first + 1, tokens.shape[1] - 1)]
        checks = jnp.where(found, first + 1 + too, limit)
        return Visited(jnp.where(found, first, limit), too & last, checks.astype(jnp.int32), place)

    return visit


def in_all_orders(p, rounds: int, width: int):
    """All orders of the tokens, in each of the rounds, and their probabilities under sampling without replacement."""
    orders = np.array(list(itertools.permutations(range(len(p)))))
    chosen = p[orders]
    left = 1 - np.cumsum(chosen, 1) + chosen
    probability = np.prod(chosen / np.maximum(left, chosen), 1)
    orders = np.hstack([orders, np.broadcast_to(np.arange(len(p), width), (len(orders), width - len(p)))])
    index = np.array(list(itertools.product(range(len(orders)), repeat=rounds)))
    return orders[index], probability[index].prod(1)


@pytest.mark.parity("awrs/exact_expectations*.npz")
def test_expectations(golden, parity):
    """E[W 1(X = x)], E[W^2] and E[checks] over all orders, against an enumeration of others."""
    sizes = {"improper": {"estimator": "local"}, "recursive": {"estimator": "recursive"}}
    sizes |= {f"recursive_m{m}": {"estimator": "recursive", "max_rejects": m} for m in (2, 3)}
    sizes["paper"] = {"estimator": "paper"}
    width = max(problem["V"] for problem in golden.config["problems"])
    for name, options in sizes.items():
        rounds, spans, rows = 2 if name == "paper" else 1, {}, {"logits": [], "orders": [], "accept": []}
        for number, problem in enumerate(golden.config["problems"]):
            few = math.factorial(problem["V"]) ** rounds < 20_000
            if f"out/{number}_{name}_expected_weight" not in golden.arrays or not few:
                continue
            p, accept = golden[f"in/{number}_p"], golden[f"in/{number}_accept"]
            orders, probability = in_all_orders(p, rounds, width)
            first = sum(map(len, rows["orders"]))
            spans[number] = slice(first, first + len(orders)), probability
            rows["orders"].append(orders)
            more = (0, width - len(p))
            for key, value in (
                ("logits", np.pad(np.log(p), more, constant_values=-np.inf)),
                ("accept", np.pad(accept, more)),
            ):
                rows[key].append(np.broadcast_to(value, (len(orders), width)))
        assert spans, name
        with jax.enable_x64(True):
            logits, orders, table = (jnp.asarray(np.concatenate(each)) for each in rows.values())
            noise, visit = Orders(jnp.maximum(logits, -1e6), orders), table_visit(table.astype(bool))
            sampler = AWRS(block=4, **options)
            every = jax.jit(lambda logits: sampler.sample(logits, noise, (), visit))(logits)  # noqa: B023
        for number, (span, probability) in spans.items():
            p, accept = golden[f"in/{number}_p"], golden[f"in/{number}_accept"]
            weights = np.exp(np.asarray(every.log_weights[span]))
            expected = (probability * weights) @ np.eye(len(p))[np.asarray(every.tokens[span])]
            parity(f"{number} {name} weight", expected, golden[f"out/{number}_{name}_expected_weight"], 1e-10)
            if name != "improper":
                parity(f"{number} {name} is proper", expected, p * accept, 1e-10)
            second = golden[f"out/{number}_{name}_second_moment"]
            parity(f"{number} {name} W^2", probability @ weights**2, second, 1e-10)
            if name != "paper":  # there, a token that is accepted twice is checked once
                checks = probability @ np.asarray(every.checks[span])
                parity(f"{number} {name} checks", checks, golden[f"out/{number}_{name}_expected_checks"], 1e-10)


def drawn_many(p, accept, count: int = 30_000, **options):
    """`count` draws for each row of p and accept."""
    p, accept = (np.repeat(np.atleast_2d(x), count, 0) for x in (p, accept))
    noise = RandomNoise(jax.random.split(jax.random.key(7), len(p)))
    visit = table_visit(jnp.asarray(accept, bool))
    logits = jnp.log(jnp.asarray(p, jnp.float32))
    return jax.jit(lambda logits: AWRS(**options).sample(logits, noise, (), visit))(logits)


@pytest.mark.parity("awrs/exact_expectations*.npz")
def test_geometric_expectations(golden):
    """The estimator with phantoms, by simulation: proper, and of the known variance."""
    count, width = 30_000, len(golden["in/2_p"])
    every = [
        [np.pad(golden[f"in/{n}_{name}"], (0, width - len(golden[f"in/{n}_p"]))) for n in (0, 2)]
        for name in ("p", "accept")
    ]
    for name, options in {"r2": {}, "r3_m4": {"max_accepts": 3, "max_rejects": 4}}.items():
        drawn = drawn_many(*map(np.array, every), count, estimator="geometric", **options)
        for number, p, accept, span in zip((0, 2), *every, (slice(0, count), slice(count, None))):
            weights = np.exp(np.asarray(drawn.log_weights[span], np.float64))
            each = weights[:, None] * np.eye(width)[np.asarray(drawn.tokens[span])]
            error = each.std(0) / math.sqrt(count)
            assert (np.abs(each.mean(0) - p * accept) <= 4 * error + 1e-12).all(), (number, name)
            second, spread = (weights**2).mean(), (weights**2).std() / math.sqrt(count)
            expected = float(golden[f"out/{number}_geometric_{name}_second_moment"])
            assert abs(second - expected) <= 4 * spread, (number, name, second, expected)
            if name == "r2":
                z = (p * accept).sum()
                variance = (-math.log(z) / (1 - z) - 1) * z**2
                fourth = ((weights - weights.mean()) ** 4).mean()
                assert abs(weights.var() - variance) < 4 * math.sqrt((fourth - weights.var() ** 2) / count)


def test_extremes():
    """Everything allowed, nothing, one token: no variance. The authors' code gives up where Z is below 1e-5."""
    p = np.array([[0.5, 0.3, 0.15, 0.05]] * 3 + [[0.6, 0.4 - 1e-8, 1e-8, 0.0]])
    accept = np.array([[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0]])
    for estimator in ("recursive", "geometric", "paper"):
        everything, nothing, one, tiny = np.split(
            np.asarray(drawn_many(p, accept, 200, estimator=estimator).log_weights), 4
        )
        np.testing.assert_allclose(everything, 0, atol=1e-6)
        assert (nothing == -np.inf).all()
        if estimator == "recursive":
            np.testing.assert_allclose(np.exp(one), 0.05, rtol=1e-5)
            np.testing.assert_allclose(tiny, math.log(1e-8), rtol=1e-4)
    given_up = drawn_many(p[3], accept[3], 200, estimator="recursive", tolerance=1e-5)
    assert (np.asarray(given_up.log_weights) == -np.inf).all()


def test_local_is_masking_and_what_it_costs():
    """One round draws from the masked distribution; the mean number of checks is 1 + sum of p / (p + Z) (rejected)."""
    p, accept = np.array([0.35, 0.3, 0.2, 0.1, 0.05]), np.array([0, 1, 0, 1, 1])
    drawn = drawn_many(p, accept, estimator="local")
    z, count = (p * accept).sum(), len(drawn.tokens)
    share = np.bincount(drawn.tokens, minlength=5) / count
    expected = p * accept / z
    assert (np.abs(share - expected) <= 4 * np.sqrt(expected * (1 - expected) / count)).all()
    mean = 1 + sum(x / (x + z) for x in p[accept == 0])
    assert abs(drawn.checks.mean() - mean) < 4 * drawn.checks.std() / math.sqrt(count)


def test_results_do_not_depend_on_the_block():
    """With one estimator, and with the other where a token is likely."""
    flat = np.random.default_rng(0).dirichlet(np.full(200, 0.3))
    p = np.stack([flat, 0.3 * flat + 0.7 * (np.arange(200) == 7)])
    accept = np.random.default_rng(1).random((2, 200)) < 0.1
    one, many = (drawn_many(p, accept, 150, block=block) for block in (1, 64))
    np.testing.assert_array_equal(one.tokens, many.tokens)
    np.testing.assert_allclose(one.log_weights, many.log_weights, rtol=1e-4, atol=1e-5)


def test_the_vocabulary_is_not_sorted():
    """XLA finds the largest keys without sorting all, but only while nothing hides from it that few are needed."""
    sampler, visit = AWRS(estimator="recursive"), table_visit(jnp.ones((2, 300), bool))
    noise = RandomNoise(jax.random.split(jax.random.key(0), 2))
    compiled = jax.jit(lambda logits: sampler.sample(logits, noise, (), visit)).lower(jnp.zeros((2, 300))).compile()
    assert "TopK" in compiled.as_text() and " sort(" not in compiled.as_text()


# Texts of a model.

SYMBOLS = Symbols(6)
"""0 to 3 are bytes, 4 too, 5 ends texts."""


@pytest.fixture(scope="module")
def tiny():
    model = Decoder(LlamaConfig(**LLAMA | {"vocab_size": 6, "max_length": 24}))
    params = jax.tree.map(lambda x: 0.7 * x, noisy_params(model))
    return model, params, Vocabulary(SYMBOLS)


def ends_well(text: bytes, complete: bool) -> bool:
    """A constraint that misleads whoever looks only one token ahead: what may come first hardly ever ends well."""
    if text[:1] not in (b"", b"\x00", b"\x01") or b"\x04" in text:
        return False
    return not complete or (len(text) > 1 and (text[0] == 1 or text[1:2] == b"\x03"))


def exact(model, params, prompt, max_tokens, weight):
    """The probability of each allowed text, by enumeration."""
    texts = [t for n in range(max_tokens) for t in itertools.product(range(5), repeat=n) if weight(bytes(t)) > 0]
    rows = np.array([(*prompt, *text, 5, *[0] * (max_tokens - 1 - len(text))) for text in texts])
    logits = jax.jit(lambda rows: jax.nn.log_softmax(model.apply({"params": params}, rows)[0]))(rows)
    logps = np.take_along_axis(np.asarray(logits, np.float64)[:, :-1], rows[:, 1:, None], -1)[..., 0]
    first = len(prompt) - 1
    sums = [row[first : first + len(text) + 1].sum() for row, text in zip(logps, texts)]
    return {(*text, 5): math.exp(logp) * weight(bytes(text)) for text, logp in zip(texts, sums)}


CRITIC = Function(lambda text, complete: 0.3 * len(text) - 0.5 * text.count(b"\x02"), critic=True)
METHODS = {
    "awrs": (PRESETS["awrs"], None),
    "mask": (PRESETS["mask"], None),
    "twisted": (PRESETS["twisted"], None),
    "rejection": (PRESETS["rejection"], None),
    "critic": (SMC(ess_threshold=0.9, resampling="residual"), CRITIC),
}
PROMPT = [2, 0, 1]


@pytest.mark.parametrize(
    "method", ["awrs", *(pytest.param(name, marks=pytest.mark.slow) for name in METHODS if name != "awrs")]
)
def test_evidence_is_unbiased(tiny, method):
    """The mean evidence of many runs is the enumerated probability, and the mean weight of each text is its own."""
    model, params, vocabulary = tiny
    (options, judge), runs, longest = METHODS[method], 400, 4

    def weight(text):
        return 0.0 if not ends_well(text, True) else math.exp(judge.function(text, True) if judge else 0)

    texts = exact(model, params, PROMPT, longest, weight)
    found = sample_texts(
        model,
        params,
        [PROMPT] * runs,
        Function(ends_well),
        vocabulary=vocabulary,
        max_tokens=longest,
        rng=jax.random.key(3),
        options=dataclasses.replace(options, particles=4),
        critic=judge,
    )
    evidence = np.exp([each.log_evidence for each in found])
    error, z = evidence.std() / math.sqrt(runs), sum(texts.values())
    assert abs(evidence.mean() - z) < 4 * error, (evidence.mean(), error, z)
    assert all(set(each.posterior()) <= set(texts) for each in found)
    each = {text: np.array([e * one.posterior().get(text, 0) for e, one in zip(evidence, found)]) for text in texts}
    for text, shares in each.items():
        assert abs(shares.mean() - texts[text]) < 4.5 * shares.std() / math.sqrt(runs) + 0.02 * z, text


@pytest.mark.slow
def test_locally_constrained_decoding_has_another_distribution(tiny):
    """The weighted texts of AWRS are at most half as far from the right distribution."""
    model, params, vocabulary = tiny
    longest = 4
    texts = exact(model, params, PROMPT, longest, lambda text: float(ends_well(text, True)))
    z = sum(texts.values())
    weighted = sample_texts(
        model,
        params,
        [PROMPT] * 400,
        Function(ends_well),
        vocabulary=vocabulary,
        max_tokens=longest,
        rng=jax.random.key(4),
    )
    shares = dict.fromkeys(texts, 0.0)
    for one in weighted:
        for text, share in one.posterior().items():
            shares[text] += math.exp(one.log_evidence) * share
    total = sum(shares.values())
    distance = sum(abs(shares[text] / total - texts[text] / z) for text in texts)
    found = sample_texts(
        model,
        params,
        [PROMPT] * 1600,
        Function(ends_well),
        vocabulary=vocabulary,
        max_tokens=longest,
        rng=jax.random.key(4),
        options=PRESETS["local"],
    )
    ended = [tuple(one.tokens[0]) for one in found if one.log_weights[0] > -math.inf]
    assert distance < 0.5 * sum(abs(ended.count(text) / len(ended) - texts[text] / z) for text in texts)


def test_a_proposal_equal_to_the_model_changes_nothing(tiny):
    model, params, vocabulary = tiny
    call = functools.partial(
        sample_texts,
        model,
        params,
        [[2, 0, 1], [3]],
        Function(ends_well),
        vocabulary=vocabulary,
        max_tokens=4,
        rng=jax.random.key(3),
    )
    plain, proposed = call(), call(proposal=(model, params))
    assert [one.tokens for one in plain] == [one.tokens for one in proposed]
    np.testing.assert_allclose(plain[0].log_weights, proposed[0].log_weights, atol=1e-5)
    assert plain[0].checks < 5 * 4 * 6


def test_bad_input(tiny):
    model, params, vocabulary = tiny
    call = functools.partial(
        sample_texts, model, params, vocabulary=vocabulary, max_tokens=4, rng=jax.random.key(0), options=PRESETS["awrs"]
    )
    with pytest.raises(ValueError, match="must be True or False"):
        call([[1]], Function(lambda text, complete: 0.5))
    with pytest.raises(ValueError, match="must be True or False"):
        call([[1]], Function(lambda text, complete: True if len(text) < 2 else 3))
    with pytest.raises(ValueError, match="rejects the empty text"):
        call([[1]], Function(lambda text, complete: False))
    with pytest.raises(ValueError, match="prompt 0 is empty"):
        call([[]], Function(ends_well))
    with pytest.raises(ValueError, match="2 constraints and 1 prompts"):
        call([[1]], [Function(ends_well)] * 2)
    with pytest.raises(ValueError, match="exceed the model's max_length"):
        call([[1] * 22], Function(ends_well))
    with pytest.raises(ValueError, match="NaN"):
        sample_texts(
            model,
            jax.tree.map(lambda x: x * jnp.nan, params),
            [[1]],
            Function(ends_well),
            vocabulary=vocabulary,
            max_tokens=4,
            rng=jax.random.key(0),
        )
    dead = call([[1]], Function(lambda text, complete: not complete))
    assert dead[0].log_evidence == -math.inf and dead[0].posterior() == {} and dead[0].effective == 0
    for bad in (
        {"particles": 0},
        {"ess_threshold": 1.5},
        {"constrain": "x"},
        {"resampling": "x"},
        {"temperature": 0.0},
        {"awrs": AWRS(estimator="local")},
    ):
        with pytest.raises(ValueError, match=next(iter(bad)) if "awrs" not in bad else "local"):
            SMC(**bad)
    for bad in (
        {"estimator": "x"},
        {"max_accepts": 1},
        {"max_rejects": 1},
        {"tolerance": 1.0},
        {"block": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(bad))):
            AWRS(**bad)
