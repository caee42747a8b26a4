"""What the `jaxtok` command does, as functions: each of these is a verb of the command line, and can be imported."""

from jaxtok.verbs.change import adapt, grow
from jaxtok.verbs.convert import convert
from jaxtok.verbs.text import evaluate, generate
from jaxtok.verbs.tokenizers import tokenizer

__all__ = ["adapt", "convert", "evaluate", "generate", "grow", "tokenizer"]
