"""What a smaller cache costs a real model: each evictor's loss on a long text, and what it generates.

    python -m jaxtok.studies.eviction smollm2                      # texts of 2,048 tokens with half of the cache
    python -m jaxtok.studies.eviction smollm2 --what generation --fraction 0.25    # 128 new tokens after 1,024
    python -m jaxtok.studies.eviction smollm2 --every 64 --evictors h2o kvpress-h2o snapkv kvpress-snapkv

For the loss, a text is read as it would be generated: the first half is the prompt, then every token is given, and the
model's loss on it is measured with the cache as it is at that moment. At no time does the cache hold more than the
budget.

Evictors whose names begin with kvpress- are those of NVIDIA's kvpress 0.5.5 (PyTorch) on the same weights. They are
left out where it is not installed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Float, Int
from tyro.conf import Positional, arg

from jaxtok.decoding import Evictor, Sampling, generate, parse_evictor
from jaxtok.decoding.protocols import Verified
from jaxtok.door import open_model
from jaxtok.protocols import CausalLM, Params

EVICTORS = (
    "keyformer",
    "keyformer,sinks=4",
    "keyformer,noise=none",
    "h2o",
    "h2o,sinks=4",
    "snapkv",
    "tova",
    "expected",
    "streaming",
    "window",
)
EVERY = 16
KVPRESS = "kvpress-"


@dataclasses.dataclass(frozen=True)
class Given:
    """A text that is known: as a `Chooser` it takes the text's tokens, as a `Drafter` it proposes all of them.

    So the engine reads a text as it generates one, several tokens at a time. The state is the text [batch, new], and,
    for the chooser, where in it each row is.
    """

    nodes: int = EVERY

    chain = True
    draws = False

    def choose(self, logits: Array, keys: Array, state: tuple[Array, Array]) -> tuple[Array, Any]:
        text, number = state
        return jnp.take_along_axis(text, number[:, None], 1)[:, 0], (text, number + 1)

    def propose(self, state: tuple[Array, Array], text: Array, length: Array) -> tuple[Array, Array]:
        known, start = state
        index = (length - start)[:, None] - 1 + jnp.arange(self.nodes)
        tokens = jnp.take_along_axis(known, jnp.clip(index, 0, known.shape[1] - 1), 1)
        parents = jnp.broadcast_to(jnp.arange(-1, self.nodes - 1), tokens.shape)
        return tokens, jnp.where(index < known.shape[1], parents, -1)

    def observe(self, state: Any, verified: Verified) -> Any:
        return state


def losses(
    model: CausalLM, params: Params, texts: Int[np.ndarray, "batch length"], prompt: int, evictor: Evictor | None
) -> Float[np.ndarray, "batch new"]:
    """The loss in nats of each token after the first `prompt` of each text, read with an evictor."""
    texts = np.asarray(texts, np.int32)
    batch, new = len(texts), texts.shape[1] - prompt
    known = jnp.asarray(texts[:, prompt:])
    found = generate(
        model,
        params,
        texts[:, :prompt].tolist(),
        max_new_tokens=new,
        chooser=Given(),
        drafter=Given(EVERY if evictor is None else evictor.every),
        evictor=evictor,
        chooser_state=(known, jnp.zeros(batch, jnp.int32)),
        drafter_state=(known, jnp.full(batch, prompt, jnp.int32)),
    )
    assert found.tokens == texts[:, prompt:].tolist()
    return -np.asarray(found.logprobs)


def kvpress_losses(
    folder: Path, texts: Int[np.ndarray, "batch length"], prompt: int, name: str, slots: int, every: int
) -> Float[np.ndarray, "batch new"]:
    """`losses` with a method of kvpress, on the model in a Hugging Face folder. Up to `slots` slots are in use."""
    import kvpress
    import torch
    import transformers

    options = {"snapkv": {"window_size": 32}}.get(name, {})
    presses = {
        "h2o": kvpress.ObservedAttentionPress,
        "snapkv": kvpress.SnapKVPress,
        "tova": kvpress.TOVAPress,
        "expected": kvpress.ExpectedAttentionPress,
        "streaming": kvpress.StreamingLLMPress,
    }
    if name not in presses:
        raise ValueError(f"{KVPRESS}{name} is not known; NAME in {KVPRESS}NAME must be one of {', '.join(presses)}.")
    attention = "eager" if name == "h2o" else "sdpa"  # the former tells its weights
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    press = kvpress.PrefillDecodingPress(
        presses[name](compression_ratio=max(1 - (slots - every) / prompt, 0.0), **options),
        kvpress.DecodingPress(presses[name](**options), compression_interval=every, target_size=slots - every),
    )
    rows = []
    for text in torch.tensor(texts, dtype=torch.long):
        cache, loss = transformers.DynamicCache(), []
        with torch.inference_mode(), press(model.eval()):
            logits = model(text[None, :prompt], past_key_values=cache, logits_to_keep=1).logits
            for place in range(prompt, len(text)):
                loss.append(torch.nn.functional.cross_entropy(logits[:, -1], text[None, place]).item())
                here = {"past_key_values": cache, "position_ids": torch.tensor([[place]])}
                logits = model(text[None, place : place + 1], **here).logits
                assert cache.get_seq_length() <= slots
        rows.append(loss)
    return np.array(rows)


def far_tokens(text: Int[np.ndarray, " length"], prompt: int, window: int) -> np.ndarray:
    """Whether each token after the prompt ends a pair of tokens that the text has before, but not in the last
    `window` tokens: what only a far part of the text can tell."""
    last: dict[tuple[int, int], int] = {}
    far = np.zeros(len(text), bool)
    for index in range(1, len(text)):
        pair = int(text[index - 1]), int(text[index])
        far[index] = pair in last and index - last[pair] > window
        last[pair] = index
    return far[prompt:]


def long_texts(tokenizer: Any, length: int, count: int, file: Path | None) -> Int[np.ndarray, "count length"]:
    """The first tokens of a file, or of Python's own modules and chapters of its documentation, by turns."""
    if file is not None:
        documents = [file.read_text()]
    else:
        import argparse
        import doctest
        from pydoc_data.topics import topics

        code = [Path(module.__file__).read_text() for module in (argparse, doctest)]
        documents = [code[0], topics["specialnames"], code[1], topics["compound"]][:count]
    rows = [tokenizer.encode(text)[:length] for text in documents]
    if short := [len(row) for row in rows if len(row) < length]:
        raise ValueError(f"a text has {short[0]} tokens; it must have at least {length}.")
    return np.asarray(rows, np.int32)


def with_budget(name: str, slots: int, every: int) -> Evictor:
    """The evictor of a name with options, such as `h2o,sinks=4`, that never has more than `slots` slots in use."""
    head, *options = name.split(",")
    return parse_evictor(",".join([f"{head}:{slots - every}", f"every={every}", *options]))


def eviction(
    model: Positional[Annotated[str, arg(metavar="MODEL")]] = "smollm2",
    what: Literal["loss", "generation"] = "loss",
    evictors: tuple[str, ...] = EVICTORS,
    length: int = 2048,
    fraction: float = 0.5,
    every: int = EVERY,
    texts: int = 1,
    file: Path | None = None,
    output: Path | None = None,
) -> list[dict[str, Any]]:
    """Measures evictors on long texts, and prints a row for each as it is done.

    Args:
      model: What `jaxtok.open` takes.
      what: The loss on the second half of texts, or how varied generated text is.
      evictors: Names with options, such as h2o,sinks=4.
      length: The tokens of a text.
      fraction: The budget as a part of the length.
      every: The tokens between two evictions.
      texts: How many of Python's modules and chapters are read, at most 4.
      file: A text file in their place.
      output: A file of JSON lines to which rows are added; evictors that it has are not measured again.
    """
    opened = open_model(model)
    module, params, tokenizer = opened.module, jax.device_put(opened.params), opened.tokenizer
    rows = [json.loads(line) for line in output.read_text().splitlines()] if output and output.is_file() else []
    measure = _loss if what == "loss" else _generation
    given, slots = long_texts(tokenizer, length, texts, file), int(fraction * length)
    for name in ("full", *evictors):
        key = {"evictor": name, "what": what, "length": length, "fraction": fraction, "every": every, "texts": texts}
        if any(key.items() <= row.items() for row in rows):
            continue
        if name.startswith(KVPRESS) and not (importlib.util.find_spec("kvpress") and what == "loss"):
            print(f"{name} is left out: it needs kvpress (pip install kvpress==0.5.5), and --what loss.", flush=True)
            continue
        begin = time.time()
        if name.startswith(KVPRESS):
            method = name.removeprefix(KVPRESS)
            row = key | _of_losses(kvpress_losses(opened.path, given, length // 2, method, slots, every), given, slots)
        else:
            evictor = None if name == "full" else with_budget(name, slots, every)
            row = key | measure(module, params, given, evictor, slots, tokenizer)
        row["seconds"] = round(time.time() - begin, 1)
        rows.append(row)
        print(json.dumps(row), flush=True)
        if output:
            with output.open("a") as out:
                out.write(json.dumps(row) + "\n")
    return rows


def _loss(module, params, texts, evictor, slots, tokenizer) -> dict[str, Any]:
    return _of_losses(losses(module, params, texts, texts.shape[1] // 2, evictor), texts, slots)


def _of_losses(loss, texts, slots) -> dict[str, Any]:
    far = np.stack([far_tokens(text, texts.shape[1] - loss.shape[1], slots) for text in texts])
    found = {"loss": float(loss.mean()), "each": [round(float(mean), 4) for mean in loss.mean(1)]}
    return found | {"far_loss": float(loss[far].mean()), "far_tokens": int(far.sum())}


def _generation(module, params, texts, evictor, slots, tokenizer, new: int = 128) -> dict[str, Any]:
    """The share of the most frequent token, and how many different ones there are, in greedy text after a prompt of
    twice the budget."""
    prompts = [text[: 2 * slots].tolist() for text in texts]
    options = {"max_new_tokens": new, "chooser": Sampling(temperature=0), "num_ids": tokenizer.vocab_size}
    rows = generate(module, params, prompts, evictor=evictor, **options).tokens
    counts = [Counter(row) for row in rows]
    return {
        "largest_share": max(count.most_common(1)[0][1] / new for count in counts),
        "different": min(len(count) for count in counts),
        "text": tokenizer.decode(rows[0]).decode(errors="replace")[:200],
    }


if __name__ == "__main__":
    tyro.cli(eviction)
