"""What the `jaxtok` command does, as functions: each verb of the command line is one of these."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import jax
from tyro.conf import Positional

from jaxtok.convert import open_run
from jaxtok.data.corpora import open_corpus
from jaxtok.decoding import Sampling
from jaxtok.decoding import generate as generate_tokens
from jaxtok.interop.formats import format_of, recognised
from jaxtok.interop.peft import apply_adapter
from jaxtok.nn.lora import LoraConfig
from jaxtok.nn.parameter_attention import GROUPS, TokenCounts
from jaxtok.protocols import TextGenerator, Tokenizer
from jaxtok.tokenizers import load_tokenizer, train_sentencepiece
from jaxtok.tokenizers.byte_words import basic_words
from jaxtok.training.checkpoints import begin, fork, load, must_be_free
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.growth import Growth
from jaxtok.transfer.lora import AddLora, Lora


@dataclasses.dataclass(frozen=True)
class Opened:
    """A model to work with: a run's, or a Hugging Face folder's."""

    task: Any
    params: Any
    data: Any
    tokenizer: Tokenizer | None
    """None, where the data are no text."""
    prefix: list[int]
    """Ids in front of every text."""
    stops: list[int]
    """Ids behind which a text ends."""
    step: int = 0


def open_model(path: Path, adapter: Path | None = None, ema: bool = False) -> Opened:
    """A run's newest checkpoint, the one at RUN/checkpoints/STEP, or a Hugging Face folder.

    Of a run that trains an adapter, the model with it; and with the one in the PEFT folder `adapter`, if it is given.
    With `ema`, of a run that keeps a moving average of the parameters, this.

    Raises:
      ValueError: there is no average.
    """
    opened = _open_base(path, ema)
    if isinstance(opened.task, Lora):
        merged = opened.task.merged(opened.params)
        opened = dataclasses.replace(opened, task=opened.task.task, params=merged)
    if adapter is not None:
        model, params = apply_adapter(adapter, opened.task.model, opened.params)
        opened = dataclasses.replace(opened, task=dataclasses.replace(opened.task, model=model), params=params)
    return opened


def _open_base(path: Path, ema: bool) -> Opened:
    found = recognised(path)
    if ema and found:
        raise ValueError(f"{path} is no run, so it has no moving average; leave out ema.")
    model = format_of(path).read(path) if found else open_run(path, ema)
    return Opened(
        model.task, model.params, model.data, model.tokenizer, list(model.begin), list(model.ends), model.step
    )


def evaluate(
    checkpoint: Positional[Path],
    corpus: str = "",
    split: Literal["train", "validation", "test", "all"] = "validation",
    batches: int = 0,
    output: Path | None = None,
    adapter: Path | None = None,
    ema: bool = False,
) -> dict[str, float]:
    """Loss, perplexity and bits per byte of a checkpoint on a corpus; of a model of images, its own numbers.

    Args:
      checkpoint: a run's folder, RUN/checkpoints/STEP, or a Hugging Face folder.
      corpus: python, a file or folder, tfds:NAME or arrayrecord:PATTERN (of images: emoji, sprites, digits,
        folder:PATH, tfds:NAME or arrayrecord:PATTERN); default: what the run was trained on.
      split: of the corpus; files are split by a hash of their path.
      batches: evaluate only so many; 0: all.
      output: also write the numbers into this JSON file.
      adapter: a PEFT folder of LoRA, whose differences are added to the model.
      ema: take the moving average of the parameters, of a run that keeps one (optimizer.ema_decay).
    """
    loaded = open_model(checkpoint, adapter, ema)
    data = dataclasses.replace(loaded.data, eval_limit=batches)
    if corpus:
        data = dataclasses.replace(data, **{data.source: corpus})
    metrics = loaded.task.evaluate(loaded.params, data.eval_batches(split))
    source = {data.source: getattr(data, data.source)}
    row = {"checkpoint": str(checkpoint), **source, "split": split, "step": loaded.step} | metrics
    if output:
        output.write_text(json.dumps(row, indent=2) + "\n")
    return row


def generate(
    checkpoint: Positional[Path],
    prompt: tuple[str, ...] = ("",),
    prompt_file: Path | None = None,
    max_new_tokens: int = 0,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    stop_at_end: bool = True,
    stream: bool = True,
    adapter: Path | None = None,
    ema: bool = False,
) -> list[bytes]:
    """Continues prompts: a single one token by token on the terminal, several as a batch.

    Args:
      checkpoint: a run's folder, RUN/checkpoints/STEP, or a Hugging Face folder.
      prompt: one or several texts to continue; an empty one starts a new document.
      prompt_file: a file with one prompt a line, instead.
      max_new_tokens: at most so many for each prompt (bytes, for models that generate words); 0: 200, or what the
        model's context has room for.
      temperature: below 1 is safer, above is wilder; 0: always the most likely token.
      top_k: only the k most likely tokens; 0: all.
      top_p: only the most likely tokens that together have this probability; 1: all.
      seed: another seed, another text.
      stop: also stop behind these texts, each of a single token (with bytes: a single character).
      stop_at_end: stop where the model ends the document.
      stream: write the texts to the standard output.
      adapter: a PEFT folder of LoRA, whose differences are added to the model.
      ema: take the moving average of the parameters, of a run that keeps one (optimizer.ema_decay).
    """
    loaded = open_model(checkpoint, adapter, ema)
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise ValueError(f"{checkpoint} is of {type(loaded.task).__name__}, whose data are no text to continue.")
    prompts = tuple(prompt_file.read_text().splitlines()) if prompt_file else prompt
    sampling, rng = Sampling(temperature=temperature, top_k=top_k, top_p=top_p), jax.random.key(seed)
    if isinstance(loaded.task, TextGenerator):
        if stop:
            raise ValueError(f"a {type(loaded.task).__name__} does not stop at texts; leave out stop.")
        given = [text.encode() for text in prompts]
        texts = loaded.task.continue_text(
            loaded.params, given, max_bytes=max_new_tokens or 200, sampling=sampling, rng=rng
        )
        if stream:
            _print_texts(given, texts)
        return texts
    if not hasattr(loaded.task, "module") or not hasattr(loaded.task.module(), "init_cache"):
        raise ValueError(f"a {type(loaded.task).__name__} does not generate text; give a language model.")

    stops = [tokenizer.encode(text) for text in stop]
    if long := [text for text, tokens in zip(stop, stops) if len(tokens) != 1]:
        raise ValueError(f"stop has {long[0]!r}, which is not a single token; choose texts that are.")

    def text_of(tokens: list[int]) -> bytes:
        return b"".join(tokenizer.token_bytes(token) for token in tokens)

    ids = [[*loaded.prefix, *tokenizer.encode(text)] for text in prompts]
    room = loaded.task.model.max_length - max(map(len, ids), default=0)
    live = stream and len(prompts) == 1
    if live:
        _write(prompts[0].encode())
    rows = generate_tokens(
        loaded.task.module(),
        loaded.params,
        ids,
        max_new_tokens=max_new_tokens or max(1, min(200, room)),
        chooser=sampling,
        rng=rng,
        stop_tokens=[*(token for (token,) in stops), *(loaded.stops if stop_at_end else [])],
        num_ids=tokenizer.vocab_size,
        on_tokens=(lambda new: _write(text_of(new.tokens[0]))) if live else None,
        chunk=4,
    ).tokens
    texts = [text_of(row) for row in rows]
    if live:
        _write(b"\n")
    elif stream:
        _print_texts([text.encode() for text in prompts], texts)
    return texts


def _print_texts(prompts: list[bytes], texts: list[bytes]) -> None:
    for number, (prompt, text) in enumerate(zip(prompts, texts)):
        _write((f"--- {number} ---\n".encode() if len(prompts) > 1 else b"") + prompt + text + b"\n")


def _write(text: bytes) -> None:
    if hasattr(sys.stdout, "buffer"):
        sys.stdout.buffer.write(text)
    else:  # a notebook's
        sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()


def grow(
    checkpoint: Positional[Path],
    to: TokenCounts = TokenCounts(),
    output: Path | None = None,
    times: float = 0.0,
    init: Literal["zero_keys", "copy", "random"] = "zero_keys",
    scale: Literal["auto", "fixed", "current"] = "auto",
    optimizer: Literal["keep", "reset"] = "reset",
    train: Literal["all", "new"] = "all",
    steps: int = 0,
    seed: int = 0,
) -> Path:
    """A new run whose model is a checkpoint's with more parameter tokens; `jaxtok train OUTPUT` goes on training it.

    Args:
      checkpoint: a run's folder, or RUN/checkpoints/STEP.
      to: parameter tokens of each group afterwards; 0 leaves a group as it is.
      output: the new run's folder; default: CHECKPOINT-grown.
      times: instead of `to`: every group grows by this factor.
      init: new rows. zero_keys preserves the function (all normalisations but softmax and gelu_layer_norm), copy does
        for whole multiples, random is the authors' released recipe and perturbs the model.
      scale: of the normalisation: fixed at the old number of tokens, or current; auto: what preserves the function.
      optimizer: keep the moments of the old tokens (new ones 0), or reset all.
      train: afterwards train all parameters, or the new tokens only.
      steps: of training after the growth; default: as before it.
      seed: for the new rows.
    """
    if times:
        if times <= 1:
            raise ValueError(f"times is {times}; it must be above 1.")
        model = load(checkpoint).task.model
        to = TokenCounts(**{g: round(getattr(model.tokens, g) * times) for g in GROUPS})
    growth = Growth(to=to, init=init, scale=scale, optimizer=optimizer, train=train, steps=steps or 1)
    return fork(
        checkpoint, output or Path(f"{str(checkpoint).rstrip('/')}-grown"), steps=steps, surgery=growth, seed=seed
    )


def adapt(
    checkpoint: Positional[Path],
    output: Path | None = None,
    lora: LoraConfig = LoraConfig(),
    adapter: Path | None = None,
    corpus: str = "",
    steps: int = 1000,
    learning_rate: float = 2e-4,
    batch_size: int = 0,
    length: int = 0,
    seed: int = 0,
) -> Path:
    """A new run that trains a LoRA adapter of a model; `jaxtok train OUTPUT` trains it, `jaxtok convert` writes it.

    Args:
      checkpoint: a run's folder, RUN/checkpoints/STEP, or a Hugging Face folder.
      output: the new run's folder; default: CHECKPOINT-adapted.
      lora: what has a difference, and of which rank.
      adapter: a PEFT folder of LoRA, whose differences are added to the model first.
      corpus: python, a file or folder, tfds:NAME or arrayrecord:PATTERN; default: what the run was trained on.
      steps: of training.
      learning_rate: its highest value; it ends at a tenth of it.
      batch_size: rows a batch; 0: as in the run (8 for a Hugging Face folder).
      length: tokens a row; 0: as in the run (the model's, 1024 at most, for a Hugging Face folder).
      seed: of the adapter and the data.
    """
    output = output or Path(f"{str(checkpoint).rstrip('/')}-adapted")
    must_be_free(output)
    opened = open_model(checkpoint, adapter)
    if opened.tokenizer is None:
        raise ValueError(f"{checkpoint} is of {type(opened.task).__name__}, and adapters are for models of text.")
    changes = {"corpus": corpus, "batch_size": batch_size, "length": length}
    data = dataclasses.replace(opened.data, seed=seed, **{name: new for name, new in changes.items() if new})
    surgery = AddLora(lora=lora)
    task, data = surgery.task(opened.task, data)
    params, _ = surgery.params(opened.task, data, opened.params, None, jax.random.key(seed))
    optimizer = OptimizerConfig(
        learning_rate=learning_rate, min_learning_rate=learning_rate / 10, warmup=0.03, weight_decay=0.0
    )
    train = TrainConfig(steps=steps, optimizer=optimizer, seed=seed)
    experiment = Experiment(task=task, data=data, name=output.name, workdir=str(output), train=train)
    return begin(experiment, params)


def tokenizer(
    output: Positional[Path],
    corpus: str = "python",
    vocab_size: int = 4096,
    model_type: Literal["unigram", "bpe"] = "unigram",
    text_field: str = "text",
    words: bool = False,
) -> dict[str, float]:
    """Trains a SentencePiece tokenizer on the training split of a corpus; use it as `--data.tokenizer OUTPUT`.

    Args:
      output: the file to write, ending in .model.
      corpus: python, a file or folder, tfds:NAME or arrayrecord:PATTERN.
      vocab_size: ids, including 256 bytes and the end of a document.
      model_type: the algorithm.
      text_field: the field of a JSONL, Parquet or TFDS row.
      words: of single words by BERT's rule, for models that read words; no piece then has a space.
    """
    documents = open_corpus(corpus, "train", text_field=text_field)
    texts = (documents[i] for i in range(len(documents)))
    if words:
        texts = (b"\n".join(basic_words(text)) for text in texts)
    path = train_sentencepiece(texts, output, vocab_size=vocab_size, model_type=model_type)
    trained = load_tokenizer(str(path))
    held_out = open_corpus(corpus, "validation", text_field=text_field)
    texts = [held_out[i] for i in range(min(len(held_out), 200))]
    sizes = [len(t if isinstance(t, bytes) else t.encode()) for t in texts]
    tokens = sum(len(trained.encode(text)) for text in texts)
    return {"tokenizer": str(path), "vocab_size": trained.vocab_size, "bytes_per_token": sum(sizes) / max(tokens, 1)}
