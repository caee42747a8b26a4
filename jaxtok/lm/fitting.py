"""How a language model is fitted to rows of text, and which rows it refuses."""

from __future__ import annotations

from typing import Any, TypeVar

from jaxtok.data.text import TextData

T = TypeVar("T")


def fit_text(task: T, data: Any) -> T:
    """The task, with a vocabulary size of 0 replaced by the tokenizer's, rounded up to 128. Other data leave it alone.

    Raises:
      ValueError: texts become ids that the model does not have (special tokens that no text has may lie beyond), or a
        row is longer than the model's context.
    """
    if not isinstance(data, TextData):
        return task
    ids = data.loaded_tokenizer.vocab_size
    if not task.model.vocab_size:
        task = task.with_model(vocab_size=-(-ids // 128) * 128)
    model = task.model
    tokenizer = data.loaded_tokenizer
    used = {*data.opening_ids, data.end_id} | {i for i in range(model.vocab_size, ids) if tokenizer.token_bytes(i)}
    if beyond := sorted(i for i in used if i >= model.vocab_size):
        raise ValueError(
            f"task.model.vocab_size is {model.vocab_size}, but the tokenizer {data.tokenizer} has {ids} ids, and texts "
            f"become such as {beyond[0]}; raise it, or set it to 0 to take the tokenizer's, or use the model's own "
            "tokenizer."
        )
    if data.length > model.max_length:
        raise ValueError(
            f"data.length is {data.length}, more than task.model.max_length = {model.max_length}; "
            "lower the first or raise the second."
        )
    return task
