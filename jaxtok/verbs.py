"""What the `jaxtok` command does, as functions: each verb of the command line is one of these."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, Literal

import jax
from tyro.conf import Positional

from jaxtok.data.corpora import open_corpus
from jaxtok.door import open_model
from jaxtok.lm.growth import Growth
from jaxtok.model import Split
from jaxtok.nn.lora import LoraConfig
from jaxtok.nn.parameter_attention import GROUPS, TokenCounts
from jaxtok.tokenizers import load_tokenizer, train_sentencepiece
from jaxtok.tokenizers.byte_words import basic_words
from jaxtok.training.checkpoints import begin, fork, load, must_be_free
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.lora import Lora
from jaxtok.training.optimizer import OptimizerConfig


def evaluate(
    checkpoint: Positional[Path],
    corpus: str = "",
    split: Split = "validation",
    batches: int = 0,
    output: Path | None = None,
    adapter: Path | None = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Measures a model on a corpus: loss, perplexity and bits per byte of text; of images, what its task measures.

    Args:
      checkpoint: A run's folder, RUN/checkpoints/STEP, or a folder or file in another format (`jaxtok list`).
      corpus: The name python, a file or folder, tfds:NAME or arrayrecord:PATTERN (of images: emoji, sprites, digits,
        folder:PATH, tfds:NAME or arrayrecord:PATTERN). By default it is what the run was trained on.
      split: The part of the corpus; files are split by a hash of their path.
      batches: Only so many batches are evaluated; 0 is for all.
      output: The numbers are also written into this JSON file.
      adapter: A PEFT folder of LoRA, whose differences are added to the model.
      ema: Takes the moving average of the parameters, of a run that keeps one (optimizer.ema_decay).
    """
    model = open_model(checkpoint, adapter, ema)
    data = model.on(corpus)
    of = {"checkpoint": str(checkpoint), data.source: getattr(data, data.source), "split": split, "step": model.step}
    row = of | model.evaluate(corpus, split, batches)
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
      checkpoint: A run's folder, RUN/checkpoints/STEP, or a folder or file in another format (`jaxtok list`).
      prompt: One or several texts to continue; an empty one begins a new document.
      prompt_file: A file with one prompt a line, which is read instead.
      max_new_tokens: At most so many tokens for each prompt (bytes, for models that generate words); 0 is for 200, or
        what the model's context has room for.
      temperature: Below 1 is safer, above is wilder; 0 always takes the most likely token.
      top_k: Only the k most likely tokens are drawn; 0 is for all.
      top_p: Only the most likely tokens that together have this probability are drawn; 1 is for all.
      seed: Another seed gives another text.
      stop: A text also stops after any of these, each of which is a single token (with bytes: a single character).
      stop_at_end: Whether a text stops where the model ends the document.
      stream: Whether the texts are written to the standard output.
      adapter: A PEFT folder of LoRA, whose differences are added to the model.
      ema: Takes the moving average of the parameters, of a run that keeps one (optimizer.ema_decay).
    """
    model = open_model(checkpoint, adapter, ema)
    prompts = tuple(prompt_file.read_text().splitlines()) if prompt_file else prompt
    live = stream and len(prompts) == 1
    begun = False

    def write(row: int, new: bytes) -> None:
        nonlocal begun
        _write(new if begun else prompts[row].encode() + new)
        begun = True

    texts = model.generate_bytes(
        prompts,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop,
        stop_at_end=stop_at_end,
        on_bytes=write if live else None,
    )
    if live:
        _write(b"\n" if begun else prompts[0].encode() + b"\n")
    elif stream:
        for number, (before, text) in enumerate(zip(prompts, texts)):
            _write(f"--- {number} ---\n{before}".encode() + text + b"\n")
    return texts


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
        checkpoint, output or Path(f"{str(checkpoint).rstrip('/')}-grown"), steps=steps, growth=growth, seed=seed
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
    task = Lora(task=opened.task, lora=lora)
    params = task.start(opened.params, jax.random.key(seed))
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
