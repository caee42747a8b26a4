"""What is done with a trained model: it is measured, and it continues texts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, arg

from jaxtok.decoding import parse_evictor
from jaxtok.decoding.byte_model import generate_exact
from jaxtok.door import open_model
from jaxtok.drafters import drafter_of
from jaxtok.model import Split


def evaluate(
    checkpoint: Positional[Annotated[Path, arg(metavar="MODEL")]],
    corpus: str = "",
    split: Split = "validation",
    batches: int = 0,
    harness: Annotated[tuple[str, ...], arg(metavar="TASK ...")] = (),
    output: Annotated[Path | None, arg(metavar="FILE")] = None,
    adapter: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    ema: bool = False,
) -> dict[str, Any]:
    """Measures a model: loss, perplexity and bits per byte of a corpus; for images, its task's numbers.

    Args:
      checkpoint: A run's folder, RUN/checkpoints/STEP, a folder or file in another format, the name of a pretrained
        model (smollm2), or that of a config that was trained here.
      corpus: The corpus: python, a file or folder, tfds:NAME or arrayrecord:PATTERN (for images: emoji, sprites,
        digits, folder:PATH, tfds:NAME or arrayrecord:PATTERN). By default it is the one that the model was trained
        on.
      split: The part of the corpus; files are split by a hash of their path.
      batches: How many batches are evaluated; 0 means all. With --harness, a batch is 8 documents of each task.
      harness: Tasks of lm_eval, the field's standard harness, on which the model is measured instead: their names, or
        .yaml files (pip install 'jaxtok[harness]'; most tasks fetch their data from Hugging Face).
      output: A JSON file into which the numbers are also written.
      adapter: A PEFT folder of LoRA, whose differences are added to the model.
      ema: Whether the moving average of the parameters is taken, from a run that keeps one (optimizer.ema_decay).
    """
    if output and (output.is_dir() or not output.parent.is_dir()):
        raise ValueError(f"output is {output}; it must be a file in a folder that exists (nothing was evaluated).")
    model = open_model(checkpoint, adapter, ema)
    if harness:
        from jaxtok.harness import BATCH
        from jaxtok.harness import evaluate as run_tasks

        row = {"checkpoint": str(checkpoint), "step": model.step} | run_tasks(model, harness, batches * BATCH)
        return _kept(row, output)
    data = model.on(corpus)
    about = {"checkpoint": str(checkpoint), data.source: getattr(data, data.source), "split": split, "step": model.step}
    return _kept(about | model.evaluate(corpus, split, batches), output)


def _kept(row: dict[str, Any], output: Path | None) -> dict[str, Any]:
    if output:
        output.write_text(json.dumps(row, indent=2) + "\n")
    return row


def generate(
    checkpoint: Positional[Annotated[Path, arg(metavar="MODEL")]],
    prompt: tuple[str, ...] = ("",),
    prompt_file: Annotated[Path | None, arg(metavar="FILE")] = None,
    max_new_tokens: int = 0,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 0.95,
    seed: int = 0,
    stop: tuple[str, ...] = (),
    stop_at_end: bool = True,
    chat: bool = False,
    stream: bool = True,
    drafter: Annotated[str, arg(metavar="NAME[+NAME ...]")] = "",
    evict: Annotated[str, arg(metavar="NAME:BUDGET")] = "",
    constrain: Annotated[str, arg(metavar="KIND:...")] = "",
    exact_bytes: bool = False,
    adapter: Annotated[Path | None, arg(metavar="FOLDER")] = None,
    ema: bool = False,
) -> list[bytes]:
    """Continues prompts: one prompt is continued live on the terminal, several are continued as a batch.

    Args:
      checkpoint: A run's folder, RUN/checkpoints/STEP, a folder or file in another format, the name of a pretrained
        model (smollm2), or that of a config that was trained here.
      prompt: One or several texts to continue; an empty one begins a new document.
      prompt_file: A file with a prompt on each line, which is read instead.
      max_new_tokens: The largest number of new tokens for each prompt (of bytes, for models that generate words); 0
        means 200, or fewer if the model's context has less room.
      temperature: Below 1 it favours likely tokens, above 1 unlikely ones; 0 always takes the likeliest.
      top_k: Tokens are drawn only from the k likeliest; 0 means from all.
      top_p: Tokens are drawn only from the likeliest that together have this probability; 1 means from all.
      seed: The seed; another one gives another text.
      stop: Texts after which generation also stops, each of a single token (with bytes: a single character).
      stop_at_end: Whether generation stops when the model ends the document.
      chat: Whether each prompt is what a user says in a chat, which the model answers; its tokenizer must have a
        template for chats.
      stream: Whether the texts are written to the standard output.
      drafter: What drafts several tokens at a time, which changes the speed and not the text: prompt_lookup,
        suffix_automaton, suffix_automaton:COPIES, token_recycling, token_recycling:FILE.safetensors (which is kept from
        call to call), aded:TABLE, draft_model:MODEL; or several of them, joined by +, in one tree, such as
        suffix_automaton:3+token_recycling.
      evict: What keeps the cache small, and how small: NAME:BUDGET, such as keyformer:0.5 (half of the prompt) or
        h2o:128 (slots). The names are those of jaxtok.decoding.scorers.EVICTORS.
      constrain: What the new text must be: regex:EXPRESSION, json:SCHEMA (or its file) or grammar:FILE (Lark).
      exact_bytes: Whether a prompt may end inside a token, with the probabilities that the model gives to its bytes.
      adapter: A PEFT folder of LoRA, whose differences are added to the model.
      ema: Whether the moving average of the parameters is taken, from a run that keeps one (optimizer.ema_decay).
    """
    evictor = parse_evictor(evict) if evict else None
    if exact_bytes and (chat or constrain or stop):
        raise ValueError("exact_bytes is given with chat, constrain or stop; it goes only without them.")
    model = open_model(checkpoint, adapter, ema)
    drafting, drafter_state, keep = drafter_of(drafter, model) if drafter else (None, None, None)
    prompts = _read_prompts(prompt_file, prompt)
    live = stream and len(prompts) == 1
    shown = [b"" if chat else text.encode() for text in prompts]  # what is written before an answer
    begun = False

    def write(row: int, new: bytes) -> None:
        nonlocal begun
        _write(new if begun else shown[row] + new)
        begun = True

    options: dict[str, Any] = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop_at_end": stop_at_end,
        "on_bytes": write if live else None,
        "drafter": drafting,
        "drafter_state": drafter_state,
        "evictor": evictor,
        "on_end": keep,
    }
    if exact_bytes:
        texts = generate_exact(model, prompts, max_new_tokens or 200, **options)
    else:
        texts = model.generate_bytes(
            [model.chat_ids(text) for text in prompts] if chat else prompts,
            max_new_tokens,
            stop=stop,
            constraint=constrain,
            **options,
        )
    if live:
        _write(b"\n" if begun else shown[0] + b"\n")
    elif stream:
        for number, (before, text) in enumerate(zip(shown, texts)):
            _write(f"--- {number} ---\n".encode() + before + text + b"\n")
    return texts


def _read_prompts(file: Path | None, given: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the prompts in a file, or those that are given.

    Raises:
      ValueError: they are not text, or there is none.
    """
    where = file or "the prompt"
    try:
        prompts = tuple(file.read_text(encoding="utf-8").splitlines()) if file else given
        "".join(prompts).encode()
    except UnicodeError as error:
        raise ValueError(f"{where} is not UTF-8 text ({error}).") from error
    if not prompts:
        raise ValueError(f"{where} is empty; " + ("it must have a prompt on each line." if file else "give a text."))
    return prompts


def _write(text: bytes) -> None:
    if hasattr(sys.stdout, "buffer"):
        sys.stdout.buffer.write(text)
    else:  # in a notebook
        sys.stdout.write(text.decode(errors="replace"))
    sys.stdout.flush()
