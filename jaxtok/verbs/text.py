"""What models of text do: measure and continue texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from jaxtok.door import open_model
from jaxtok.model import Split


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
