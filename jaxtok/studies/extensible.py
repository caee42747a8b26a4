"""What a frozen language model gains from raw context, and from extensible embeddings (arXiv 2401.07793)."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxtok.data.text import TextData
from jaxtok.lm.extensible import Extensible, ExtensibleModeling
from jaxtok.nn.losses import cross_entropy
from jaxtok.protocols import FROZEN, Params
from jaxtok.studies.comparison import Comparison


def write_topics(file: Path) -> Path:
    """Writes the topics of Python's documentation, `pydoc_data.topics`, as a corpus of a row each."""
    from pydoc_data.topics import topics

    file.parent.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in topics.values()))
    return file


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValueOfContext:
    """Measures the nats a token of the last chunk of rows, but for its first token, in rows of a single document of the
    splits that nothing was trained on.

    no_context       the chunk alone
    raw_n            after n raw tokens
    ets_k            after the extensible embeddings of all earlier chunks, at k
    untrained_k      the same, of a tokenizer that is still a copy of the language model's first layers
    ets_k_session_s  of sessions of s tokens instead of the task's own
    """

    raw: tuple[int, ...] = ()
    scales: tuple[int, ...] = ()
    sessions: tuple[int, ...] = ()

    def __call__(self, task: ExtensibleModeling, params: Params, data: TextData) -> dict[str, float]:
        if not isinstance(task, ExtensibleModeling):
            return {}
        untrained = task.start(params[FROZEN], jax.random.key(0))
        own, chunk = task.model.session, task.chunk
        cases = {"no_context": (params, own, 1, 0)}
        cases |= {f"raw_{n}": (params, own, 1, n) for n in self.raw}
        cases |= {f"ets_{k}": (params, own, k, None) for k in self.scales}
        cases |= {f"untrained_{k}": (untrained, own, k, None) for k in self.scales}
        cases |= {f"ets_{k}_session_{s}": (params, s, k, None) for s in self.sessions if s != own for k in self.scales}
        nats, count = dict.fromkeys(cases, 0.0), 0
        for rows in self.rows(data):
            count += rows.shape[0] * (chunk - 1)
            for name, (given, session, k, raw) in cases.items():
                config = dataclasses.replace(task.model, session=session)
                nats[name] += float(_nats(config, given, rows, k, raw, chunk))
        return {name: total / count for name, total in nats.items()}

    def rows(self, data: TextData) -> Iterator[np.ndarray]:
        """The rows, in batches of one size but for the last."""
        data = dataclasses.replace(data, eval_limit=0)
        found = []
        for split in ("validation", "test"):
            for batch in data.eval_batches(split):
                whole = (batch["mask"].min(1) > 0) & (batch["segments"].min(1) == batch["segments"].max(1))
                found.append(batch["tokens"][whole])
        tokens = np.concatenate(found)
        for start in range(0, len(tokens), 64):
            yield tokens[start : start + 64]


@functools.partial(jax.jit, static_argnames=("config", "k", "raw", "chunk"))
def _nats(config, params, tokens, k, raw, chunk):
    """The sum over the last chunk's tokens but the first, after `raw` raw tokens (None: after the ETs of all)."""
    module, past, last = Extensible(config), tokens[:, :-chunk], tokens[:, -chunk:]
    if raw is None:
        before = module.apply({"params": params}, past, method="outputs")[:, k - 1 :: k]
    else:
        before = past[:, past.shape[1] - raw :]
    logits, _ = module.apply({"params": params}, (before, last), method="read")
    return jnp.sum(cross_entropy(logits[:, -chunk:-1], last[:, 1:]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtensibleStudy(Comparison):
    """A comparison on the topics of Python's documentation."""

    def run(self) -> bool:
        """Runs the comparison on topics.jsonl, which it writes into its folder."""
        corpus = str(write_topics(Path(self.workdir) / "topics.jsonl"))
        arms = tuple(dataclasses.replace(arm, data=dataclasses.replace(arm.data, corpus=corpus)) for arm in self.arms)
        return super(ExtensibleStudy, dataclasses.replace(self, arms=arms)).run()
