"""Constraints on the text that a model generates: regular expressions, JSON schemas, grammars, any Python function.

A `Constraint` runs on the host, on bytes. On the device, a row only has the *name* of its text so far: a hash of the
constraint and of the tokens. `Vocabulary` has the constraint's own states by these names, so that a row can be
gathered, copied, or dropped with a draft as arrays can, and one compiled program serves all constraints. The program
asks through `jax.pure_callback`, for all rows at once.

`Constrained` is the chooser of locally constrained decoding: tokens that the constraint forbids are left out, and the
rest is renormalised. For whole texts with the right distribution, see `jaxtok.decoding.awrs`.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from jaxtok.decoding.sampling import Sampling
from jaxtok.protocols import Tokenizer

_KEPT = 20_000  # the number of states that a vocabulary keeps; a row needs one


class Constraint(Protocol):
    """Which texts are allowed, token by token. It runs on the host; its states are never changed, only replaced."""

    name: str
    """Tells it from other constraints."""
    masks: bool
    """Whether a mask over the whole vocabulary costs little more than a check of one token."""

    def start(self, vocabulary: Vocabulary) -> Any:
        """The state of the empty text.

        Raises:
          ValueError: the constraint means nothing, or nothing satisfies it.
        """
        ...

    def allows(self, state: Any, token: int) -> bool:
        """Whether some allowed text begins with the state's text and this token (or may: what is too permissive costs
        time, what is too strict is wrong). Tokens that end texts are not asked for."""
        ...

    def advance(self, state: Any, token: int) -> Any:
        """The state after the token; None: it is not allowed."""
        ...

    def score(self, state: Any, complete: bool) -> float:
        """0 if the text is allowed (`complete`: as a whole; otherwise as a beginning), minus infinity if not. A critic
        may return any log weight; its beginnings' weights guide the search and do not change its result."""
        ...

    def mask(self, state: Any) -> Bool[np.ndarray, " vocab"]:
        """Which tokens are allowed. Called only if `masks`."""
        ...


@dataclasses.dataclass(frozen=True)
class Function:
    """A constraint, or a critic, that is a Python function of bytes.

    The bytes can end inside a character. A constraint's function returns True or False, a critic's a log weight.

    >>> from jaxtok.tokenizers.bytes import ByteTokenizer
    >>> even = Function(lambda text, complete: not complete or len(text) % 2 == 0)
    >>> [Vocabulary(ByteTokenizer()).follow(even, list(text)) for text in (b"ab", b"abc")]
    [0.0, -inf]
    """

    function: Callable[[bytes, bool], bool | float]
    """Takes a text and whether it is complete."""
    critic: bool = False
    """Whether it returns log weights. Such a function forbids no token when it is used as a constraint."""

    masks: ClassVar[bool] = False

    @property
    def name(self) -> str:
        return f"{self.function!r} {id(self.function)}"

    def start(self, vocabulary: Vocabulary) -> tuple[bytes, Vocabulary]:
        return b"", vocabulary

    def _text(self, state: Any, token: int) -> bytes:
        text, vocabulary = state
        return text + vocabulary.tokens[token]

    def allows(self, state: Any, token: int) -> bool:
        return self._value(self._text(state, token), False) > -np.inf

    def advance(self, state: Any, token: int) -> Any:
        return (self._text(state, token), state[1])  # its score is asked for where it counts

    def score(self, state: Any, complete: bool) -> float:
        return self._value(state[0], complete)

    def _value(self, text: bytes, complete: bool) -> float:
        value = self.function(text, complete)
        if self.critic:
            if np.isnan(value) or value == np.inf:
                raise ValueError(f"the critic returned {value} for {text!r}; it must be finite, or minus infinity.")
            return float(value)
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"the constraint returned {value!r} for {text!r}; it must be True or False.")
        return 0.0 if value else -np.inf

    def mask(self, state: Any) -> Bool[np.ndarray, " vocab"]:
        return np.array([bool(text) and self.allows(state, token) for token, text in enumerate(state[1].tokens)])


@dataclasses.dataclass(frozen=True)
class Grammar:
    """A constraint in a language of `llguidance` (an extra): a regular expression, a JSON schema or a Lark grammar.

    >>> from jaxtok.tokenizers.bytes import ByteTokenizer
    >>> [Vocabulary(ByteTokenizer()).follow(Grammar("regex", "(ab)+"), list(text)) for text in (b"abab", b"aba")]
    [0.0, -inf]
    """

    kind: str
    """regex, json or grammar."""
    text: str
    """The expression, the schema as JSON, or the grammar in llguidance's dialect of Lark."""

    masks: ClassVar[bool] = True

    def __post_init__(self):
        if self.kind not in ("regex", "json", "grammar"):
            raise ValueError(f"a constraint is of kind {self.kind!r}; it must be regex, json or grammar.")
        if self.kind == "json":
            try:
                json.loads(self.text)
            except json.JSONDecodeError as error:
                raise ValueError(f"the JSON schema is no JSON: {error}.") from None

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.text}"

    def start(self, vocabulary: Vocabulary) -> Any:
        try:
            import llguidance
        except ImportError:
            raise ValueError(f"a constraint of kind {self.kind} needs `pip install jaxtok[constraints]`.") from None
        matchers = llguidance.LLMatcher
        makers = {
            "regex": matchers.grammar_from_regex,
            "json": matchers.grammar_from_json_schema,
            "grammar": matchers.grammar_from_lark,
        }
        matcher = matchers(vocabulary.llguidance, makers[self.kind](self.text), log_level=0)
        if matcher.is_error():
            said = " ".join(line.strip() for line in matcher.get_error().splitlines() if line.strip())
            raise ValueError(f"the constraint {self.kind}:{_short(self.text)} cannot be used: {_short(said, 200)}.")
        state = _Matched(matcher, vocabulary)
        if not matcher.is_accepting() and not self.mask(state).any():
            raise ValueError(f"no text satisfies the constraint {self.kind}:{_short(self.text)}.")
        return state

    def allows(self, state: _Matched, token: int) -> bool:
        return state.matcher.validate_tokens([token]) == 1

    def advance(self, state: _Matched, token: int) -> _Matched | None:
        if not self.allows(state, token):
            return None
        after = state.matcher.deep_copy()
        after.consume_token(token)
        self._check(after)
        return _Matched(after, state.vocabulary)

    def score(self, state: _Matched, complete: bool) -> float:
        return 0.0 if not complete or state.matcher.is_accepting() else -np.inf

    def mask(self, state: _Matched) -> Bool[np.ndarray, " vocab"]:
        # Where bytes are forced, the library's mask has only the token with which it would write them itself.
        if forced := state.matcher.compute_ff_bytes():
            mask = np.zeros(len(state.vocabulary.tokens), bool)
            for token in state.vocabulary.along(forced):
                mask[token] = self.allows(state, token)
        else:
            bits = np.frombuffer(state.matcher.compute_bitmask(), np.uint8)
            mask = np.unpackbits(bits, bitorder="little")[: len(state.vocabulary.tokens)].astype(bool)
        self._check(state.matcher)
        return mask

    def _check(self, matcher: Any) -> None:
        if matcher.is_error():  # not that the text is wrong: the parser gave up
            said = matcher.get_error().partition("\n")[0]
            if said == "NoExtensionBias":  # nothing may follow
                raise ValueError(f"no text satisfies the constraint {self.kind}:{_short(self.text)}.")
            raise ValueError(f"the constraint {self.kind}:{_short(self.text)} fails: {_short(said, 200)}.")


class _Matched(NamedTuple):
    """The state of a `Grammar`."""

    matcher: Any
    vocabulary: Vocabulary


def _short(text: str, most: int = 60) -> str:
    text = " ".join(text.splitlines())
    return text if len(text) <= most else f"{text[:most]}..."


def constraint(text: str) -> Constraint:
    """The constraint that a text names: `regex:EXPRESSION`, `json:SCHEMA` or `grammar:FILE`.

    A schema may also be given as a file's name. The file of a grammar is in llguidance's dialect of Lark.

    >>> constraint("regex:[0-9]+").kind
    'regex'

    Raises:
      ValueError: it is none of these, or the file is not text.
      FileNotFoundError: there is no such file.
    """
    kind, _, rest = text.partition(":")
    if kind not in ("regex", "json", "grammar") or not rest:
        raise ValueError(f"the constraint is {text!r}; it must be regex:EXPRESSION, json:SCHEMA or grammar:FILE.")
    is_file = kind == "grammar" or (kind == "json" and not rest.lstrip().startswith(("{", "true", "false")))
    if is_file and not Path(rest).is_file():
        raise FileNotFoundError(f"the constraint is {text!r}, but there is no file {rest}.")
    try:
        return Grammar(kind, Path(rest).read_text(encoding="utf-8") if is_file else rest)
    except UnicodeDecodeError as error:
        raise ValueError(f"the constraint is {text!r}, but the file {rest} is not UTF-8 ({error.reason}).") from None


@flax.struct.dataclass
class Place:
    """Where rows are in their constraints."""

    name: UInt32[Array, "batch 2"]
    """The name of the text so far, without the newest token."""
    newest: Int[Array, " batch"]
    """The newest token, of which the host has not heard yet; -1: there is none."""

    def then(self, tokens: Int[Array, " batch"]) -> Place:
        """The place after one more token. The newest one must be -1, as it is in what a `Vocabulary` returns."""
        return self.replace(newest=tokens.astype(jnp.int32))


class _Node(NamedTuple):
    constraint: Constraint
    state: Any
    """None: the text is not allowed."""
    ended: bool
    """Whether the text's last token ended it."""
    memory: dict[Any, Any]
    """What has been asked: whether a token is allowed, the mask."""


class Visited(NamedTuple):
    """What `Vocabulary.visit` found."""

    first: Int[Array, " batch"]
    """The number of the first allowed token; the limit if there is none."""
    next_too: Bool[Array, " batch"]
    """Whether the token after it is allowed, if that was asked."""
    checks: Int[Array, " batch"]
    """How many tokens were checked; those whose answer was known do not count."""
    place: Place


class Vocabulary:
    """The tokens of a tokenizer as constraints see them, and the states of all texts that are being generated.

    It is compared by identity, and a compiled program belongs to it: use one for all constraints.

    >>> from jaxtok.tokenizers.bytes import ByteTokenizer
    >>> vocabulary = Vocabulary(ByteTokenizer())
    >>> place = vocabulary.start([Function(lambda text, complete: b"no" not in text)])
    >>> place = vocabulary.mask(place.then(jnp.array([ord("n")])), 256)[1]
    >>> allowed, _ = vocabulary.mask(place, 256)
    >>> bool(allowed[0, ord("a")]), bool(allowed[0, ord("o")])
    (True, False)
    """

    def __init__(self, tokenizer: Tokenizer, eos: Sequence[int] | None = None):
        """Takes the tokens' bytes.

        Args:
          eos: the tokens that end a text; default: the tokenizer's.
        """
        self.tokenizer = tokenizer
        self.tokens: list[bytes] = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
        self.eos: tuple[int, ...] = tuple(tokenizer.special.eos or (tokenizer.eod_id,) if eos is None else eos)
        if not self.eos or not all(0 <= token < len(self.tokens) for token in self.eos):
            raise ValueError(f"eos is {self.eos}; it must be ids below {len(self.tokens)}, at least one.")
        for token in self.eos:
            self.tokens[token] = b""
        self.failure: Exception | None = None
        self._nodes: collections.OrderedDict[bytes, _Node] = collections.OrderedDict()
        self._llguidance: Any = None
        self._sorted = sorted((text, token) for token, text in enumerate(self.tokens) if text)

    @functools.cached_property
    def known(self) -> Bool[np.ndarray, " vocab"]:
        """The tokens that stand for bytes, and those that end texts. No constraint allows others."""
        known = np.array([bool(text) for text in self.tokens])
        known[list(self.eos)] = True
        return known

    def along(self, text: bytes) -> list[int]:
        """The tokens with which the text begins, and those that begin with the text."""
        found = []
        for length in range(1, len(text) + 1):
            first = bisect.bisect_left(self._sorted, (text[:length], -1))
            if first < len(self._sorted) and not self._sorted[first][0].startswith(text[:length]):
                break  # no token is so long
            for piece, token in itertools.islice(self._sorted, first, None):
                if not piece.startswith(text) if length == len(text) else piece != text[:length]:
                    break
                found.append(token)
        return found

    @property
    def llguidance(self) -> Any:
        """The `llguidance.LLTokenizer` of these tokens."""
        if self._llguidance is None:
            import llguidance
            from llguidance._tokenizer import TokenizerWrapper

            self._llguidance = llguidance.LLTokenizer(TokenizerWrapper(_Wrapped(self)))
        return self._llguidance

    def start(self, constraints: Sequence[Constraint]) -> Place:
        """The place of the empty text of each row.

        Raises:
          ValueError: a constraint means nothing, or nothing satisfies it.
        """
        names = []
        for each in constraints:
            name = _hash(b"", repr((type(each).__name__, each.name)).encode())
            if name not in self._nodes:
                self._keep(name, _Node(each, each.start(self), False, {}))
            names.append(np.frombuffer(name, np.uint32))
        return Place(jnp.array(np.stack(names)), jnp.full(len(names), -1, jnp.int32))

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Errors of constraints inside a compiled program come out of it as they were raised."""
        self.failure = None
        log = logging.getLogger("jax._src.callback")  # it would write a traceback of what is raised here anyway
        before, log.disabled = log.disabled, True
        try:
            yield
        except jax.errors.JaxRuntimeError:
            if self.failure is not None:
                raise self.failure from None
            raise
        finally:
            log.disabled = before

    # What runs on the device: each asks the host once, for all rows.

    def mask(self, place: Place, vocab: int) -> tuple[Bool[Array, "batch vocab"], Place]:
        """Which of the first `vocab` ids are allowed next in each row, and the place with the newest token in it."""
        words = -(-vocab // 32)
        shape = jax.ShapeDtypeStruct((len(place.newest), words), jnp.uint32)
        name, packed = self._ask(self._masks, place, shape, words=words)
        bits = (packed[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        return bits.reshape(len(packed), -1)[:, :vocab] > 0, _at(name)

    def visit(
        self,
        place: Place,
        tokens: Int[Array, "batch more"],
        limit: Int[Array, " batch"],
        next_too: Bool[Array, "batch block"],
    ) -> Visited:
        """Checks the first `limit` tokens of each row in their order, up to the first one that is allowed.

        Args:
          next_too: for each token, whether the token after it is checked too if it is the first allowed one.
        """
        rows = jax.ShapeDtypeStruct(limit.shape, jnp.int32)
        flags = jax.ShapeDtypeStruct(limit.shape, jnp.bool_)
        name, *found = self._ask(self._visits, place, rows, flags, rows, args=(tokens, limit, next_too))
        return Visited(*found, place=_at(name))

    def scores(
        self, place: Place, asked: Bool[Array, " batch"], complete: bool = False
    ) -> tuple[Float[Array, " batch"], Int[Array, " batch"], Place]:
        """The log weight of each row's text, as a beginning, or as a whole if it has ended or `complete`.

        Args:
          asked: of which rows; those of others are 0.

        Returns:
          Them, how many of them were not known yet, and the place with the newest token in it.
        """
        shape = jax.ShapeDtypeStruct(asked.shape, jnp.result_type(float))
        checks = jax.ShapeDtypeStruct(asked.shape, jnp.int32)
        name, *found = self._ask(self._scores, place, shape, checks, args=(asked,), complete=complete)
        return *found, _at(name)

    def _ask(self, function: Callable, place: Place, *shapes, args=(), **static) -> tuple[Array, ...]:
        def host(names, newest, *args):
            try:
                nodes, names = self._arrive(np.asarray(names), np.asarray(newest))
                return names, *function(nodes, *map(np.asarray, args), **static)
            except Exception as error:
                self.failure = error
                raise

        shapes = (jax.ShapeDtypeStruct(place.name.shape, jnp.uint32), *shapes)
        return jax.pure_callback(host, shapes, place.name, place.newest, *args)

    # What runs on the host.

    def _keep(self, name: bytes, node: _Node) -> None:
        self._nodes[name] = node
        if len(self._nodes) > _KEPT:
            self._nodes.popitem(last=False)

    def _arrive(self, names: np.ndarray, newest: np.ndarray) -> tuple[list[_Node], np.ndarray]:
        """The rows' nodes with their newest tokens, and their names."""
        nodes, after = [], np.empty_like(names)
        for row, token in enumerate(newest.tolist()):
            name = names[row].tobytes()
            if name not in self._nodes:
                raise ValueError("the state of a constraint is unknown: it is of another vocabulary, or was dropped.")
            self._nodes.move_to_end(name)
            node = self._nodes[name]
            if token >= 0:
                name = _hash(name, token.to_bytes(4, "little"))
                if name not in self._nodes:
                    self._keep(name, self._after(node, token))
                node = self._nodes[name]
            nodes.append(node)
            after[row] = np.frombuffer(name, np.uint32)
        return nodes, after

    def _after(self, node: _Node, token: int) -> _Node:
        if token in self.eos:
            return node._replace(ended=True, memory={})
        state = node.state
        if state is not None:
            allowed = not node.ended and self._has_bytes(token)
            state = node.constraint.advance(state, token) if allowed else None
        return node._replace(state=state, memory={})

    def _has_bytes(self, token: int) -> bool:
        return token < len(self.tokens) and bool(self.tokens[token])  # a padded vocabulary has more ids

    def _allows(self, node: _Node, token: int) -> bool:
        if node.ended or node.state is None:
            return node.ended and node.state is not None and token in self.eos
        if token in self.eos:
            return node.constraint.score(node.state, True) > -np.inf
        return self._has_bytes(token) and bool(node.constraint.allows(node.state, token))

    def _masks(self, nodes: list[_Node], words: int) -> tuple[np.ndarray]:
        packed = np.zeros((len(nodes), 4 * words), np.uint8)
        for row, node in enumerate(nodes):
            if "mask" not in node.memory:
                allowed = np.zeros(len(self.tokens), bool)
                if node.state is not None and not node.ended:
                    allowed[:] = node.constraint.mask(node.state)[: len(allowed)] & self.known
                allowed[list(self.eos)] = self._allows(node, self.eos[0])
                node.memory["mask"] = np.packbits(allowed, bitorder="little")
            bits = node.memory["mask"][: 4 * words]
            packed[row, : len(bits)] = bits
        return (packed.view(np.uint32),)

    def _visits(self, nodes: list[_Node], tokens, limit, next_too) -> tuple[np.ndarray, ...]:
        first, also = limit.astype(np.int32), np.zeros(len(nodes), bool)
        checks = np.zeros(len(nodes), np.int32)

        def check(row: int, token: int) -> bool:
            memory = nodes[row].memory
            if token not in memory:
                memory[token] = self._allows(nodes[row], token)
                checks[row] += 1
            return memory[token]

        for row, most in enumerate(limit.tolist()):
            for number, token in enumerate(tokens[row, :most].tolist()):
                if check(row, token):
                    first[row] = number
                    also[row] = next_too[row, number] and check(row, int(tokens[row, number + 1]))
                    break
        return first, also, checks

    def _scores(self, nodes: list[_Node], asked, complete: bool) -> tuple[np.ndarray, np.ndarray]:
        scores, checks = np.zeros(len(nodes), jnp.result_type(float)), np.zeros(len(nodes), np.int32)
        for row in np.flatnonzero(asked):
            node, whole = nodes[row], complete or nodes[row].ended
            if node.state is not None and ("score", whole) not in node.memory:
                node.memory["score", whole] = node.constraint.score(node.state, whole)
                checks[row] += 1
            scores[row] = -np.inf if node.state is None else node.memory["score", whole]
        return scores, checks

    def follow(self, constraint: Constraint, tokens: Sequence[int]) -> float:
        """The constraint's log weight of a whole text, given as tokens; a last one that ends texts is left out.

        >>> from jaxtok.tokenizers.bytes import ByteTokenizer
        >>> Vocabulary(ByteTokenizer()).follow(Function(lambda text, complete: len(text) < 3), list(b"abcd"))
        -inf
        """
        state = constraint.start(self)
        for token in tokens[: -1 if tokens and tokens[-1] in self.eos else None]:
            state = constraint.advance(state, token) if self._has_bytes(token) else None
            if state is None:
                return -np.inf
        return constraint.score(state, True)


def _at(name: Array) -> Place:
    return Place(name, jnp.full(len(name), -1, jnp.int32))


def _hash(name: bytes, more: bytes) -> bytes:
    return hashlib.blake2b(name + more, digest_size=8).digest()


class _Wrapped:
    """What `llguidance` asks of a tokenizer."""

    def __init__(self, vocabulary: Vocabulary):
        self.eos_token_id, self.bos_token_id = vocabulary.eos[0], None
        self.tokens = vocabulary.tokens
        self.special_token_ids = [token for token, text in enumerate(vocabulary.tokens) if not text]
        self._encode = vocabulary.tokenizer.encode

    def __call__(self, text: str | bytes) -> list[int]:
        return self._encode(text)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constrained:
    """A chooser that takes only tokens that a constraint allows (locally constrained decoding).

    Ends of texts are allowed where the text is complete: the generation must stop at them. Where nothing is allowed
    (which a constraint of `llguidance` avoids), it warns and ends the row.

    It finds the token either by a mask over the vocabulary, or by checking tokens one by one in the order in which
    sampling would draw them without replacement. With the same key, both choose the same token, unless `sampling` has
    top_k or top_p, which need the mask.

    >>> from jaxtok.tokenizers.bytes import ByteTokenizer
    >>> vowels = Function(lambda text, complete: set(text) <= set(b"aeiou"))
    >>> vocabulary = Vocabulary(ByteTokenizer())
    >>> chooser = Constrained(vocabulary=vocabulary, sampling=Sampling(temperature=0), constraint=vowels)
    >>> token, state = chooser.choose(jnp.arange(256.0)[None], jax.random.split(jax.random.key(0), 1), chooser.init(1))
    >>> bytes(token.tolist())
    b'u'
    """

    vocabulary: Vocabulary
    sampling: Sampling = Sampling()
    constraint: Constraint | None = None
    """The constraint of all rows. None: each row's own are given as the chooser's first state, from `start`; then one
    compiled program serves all constraints."""
    mask: bool = True
    """Whether by a mask; otherwise one by one."""
    block: int = 64
    """The number of tokens of a row that are sent to the host at a time, one by one."""

    def __post_init__(self):
        if self.block < 1:
            raise ValueError(f"block is {self.block}; it must be at least 1.")
        if not self.mask and (self.sampling.top_k or self.sampling.top_p < 1):
            raise ValueError(f"mask is False and sampling is {self.sampling}; top_k and top_p need the mask.")

    @property
    def draws(self) -> bool:
        return self.sampling.draws

    def start(self, constraints: Sequence[Constraint]) -> Place:
        """The first state, for a constraint in each row."""
        return self.vocabulary.start(constraints)

    def init(self, batch: int) -> Place:
        if self.constraint is None:
            raise ValueError("the chooser has no constraint; give its first state (chooser_state), from `start`.")
        return self.start([self.constraint] * batch)

    def choose(
        self, logits: Float[Array, "batch vocab"], keys: Key[Array, " batch"], state: Place
    ) -> tuple[Int[Array, " batch"], Place]:
        if self.mask:
            allowed, place = self.vocabulary.mask(state, logits.shape[-1])
            some = allowed.any(-1)
            logits = jnp.where(allowed | ~some[:, None], logits.astype(jnp.float32), -jnp.inf)
            token, _ = self.sampling.choose(logits, keys)
        else:
            token, some, place = self._one_by_one(logits, keys, state)
        jax.lax.cond(some.all(), lambda: None, lambda: jax.debug.callback(_warn, some))
        token = jnp.where(some, token, self.vocabulary.eos[0]).astype(jnp.int32)
        return token, place.then(token)

    def _one_by_one(self, logits, keys, place):
        if self.sampling.temperature == 0:
            order = logits.astype(jnp.float32)
        else:  # as jax.random.categorical draws
            order = self.sampling.restrict(logits)
            order = jax.vmap(lambda key, row: jax.random.gumbel(key, row.shape, row.dtype))(keys, order) + order
        batch, vocab = order.shape
        block, rows = min(self.block, vocab), jnp.arange(batch)
        found = jnp.zeros(batch, bool)

        def visit(carry):
            order, found, token, place = carry
            best, ids = jax.lax.top_k(order, block)
            limit = jnp.where(found, 0, (best > -jnp.inf).sum(-1))
            seen = self.vocabulary.visit(place, ids, limit, jnp.zeros(ids.shape, bool))
            here = seen.first < limit
            token = jnp.where(here, ids[rows, jnp.minimum(seen.first, block - 1)], token)
            return order.at[rows[:, None], ids].set(-jnp.inf), found | here, token, seen.place

        def goes_on(carry):
            return (~carry[1] & (carry[0] > -jnp.inf).any(-1)).any()

        # The first visit is outside the loop, so that the place is as the host returns it even if no row looks.
        carry = visit((order, found, jnp.zeros(batch, jnp.int32), place))
        _, found, token, place = jax.lax.while_loop(goes_on, visit, carry)
        return token, found, place


def _warn(some: np.ndarray) -> None:
    rows = ", ".join(map(str, np.flatnonzero(~np.asarray(some))))
    warnings.warn(f"no token is allowed next in rows {rows}; they end, and their texts are incomplete.", stacklevel=2)


def constrain(text: str, tokenizer: Tokenizer, sampling: Sampling = Sampling()) -> Constrained:
    """The chooser for the constraint that a text names; see `constraint`. The generation must stop at `vocabulary.eos`.

    >>> from jaxtok.tokenizers.bytes import ByteTokenizer
    >>> chooser = constrain("regex:[0-9]+", ByteTokenizer(), Sampling(temperature=0))
    >>> token, _ = chooser.choose(jnp.arange(257.0)[None], jax.random.split(jax.random.key(0), 1), chooser.init(1))
    >>> bytes(token.tolist())
    b'9'

    Raises:
      ValueError: the text names no constraint, or nothing satisfies it.
      FileNotFoundError: there is no such file.
    """
    vocabulary, found = Vocabulary(tokenizer), constraint(text)
    vocabulary.start([found])
    return Constrained(vocabulary=vocabulary, sampling=sampling, constraint=found)
