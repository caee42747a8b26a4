"""Training of tokenizers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from jaxtok.data.corpora import open_corpus
from jaxtok.tokenizers import load_tokenizer, train_sentencepiece
from jaxtok.tokenizers.byte_words import basic_words


def tokenizer(
    output: Positional[Annotated[Path, arg(metavar="FILE")]],
    corpus: str = "python",
    vocab_size: int = 4096,
    model_type: Literal["unigram", "bpe"] = "unigram",
    text_field: str = "text",
    words: bool = False,
) -> dict[str, Any]:
    """Trains a SentencePiece tokenizer on the training split of a corpus, for `--data.tokenizer FILE`.

    Args:
      output: The file to write, which ends in .model.
      corpus: The corpus: python, a file or folder, tfds:NAME or arrayrecord:PATTERN.
      vocab_size: How many ids there are, including those of the 256 bytes and of the end of a document.
      model_type: The algorithm that chooses the pieces.
      text_field: The field with the text, in a row of JSONL, Parquet or TFDS.
      words: Whether each piece is a part of one word by BERT's rule, for models that read words; none then has a space.
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
