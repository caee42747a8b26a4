"""Word pooling against plain models of the same body, on the words of Python's standard library.

    jaxtok study word_pooled_study

The text is the library's runs of a to z, in lower case, so that a byte is a character. All arms have a decoder of 3
layers of width 96 and about the same training compute. A word-pooled model also has one layer in the word encoder and
one in the speller, and is without the three peculiarities of the authors' code. `plain` has no positions, as released;
`plain_positions` has learned ones. word_pooled_subword_study is the study of subwords.

Expect 3.205 bits a character for `pooled` and 3.476 for `plain`, and 7.5 % and 3.3 % of the next words right. Shorter
training shows no advantage: with 200 steps of `pooled` and 300 of the plain models (seed 0, rows of one
stream), test bits a character were 3.68, against 3.59 (`plain`) and 3.60 (`plain_positions`), and 0.0 % of the next
words were right, against 1.1 % and 0.6 %.
"""

import string

from jaxtok.data.word_units import NormalizedText, WordUnitText
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.word_pooled import PlainConfig, WordPooledConfig, WordPooling
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.next_word import NextWordAccuracy
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig

CHARACTERS = f"characters: {string.ascii_lowercase}"
BODY = {"vocab_size": 384, "d_model": 96, "num_layers": 3, "num_heads": 4, "dropout": 0.0}
TEXT = {"rule": "letters", "batch_size": 6, "eval_limit": 10, "streams": 6, "shuffle_window": 64}


def train(steps: int) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=2e-3, min_learning_rate=2e-4, warmup=0.05)
    return TrainConfig(
        steps=steps, optimizer=optimizer, eval_every=steps // 4, checkpoint_every=steps, tensorboard=False
    )


def pooled(name: str, steps: int, tokenizer: str = CHARACTERS, max_units: int = 12, **options) -> Experiment:
    clean = {"mask_pads": True, "loss_on_pads": False}
    sizes = {"max_units": max_units, "max_words": 48, "unit_layers": 1, "encoder_heads": 4, "encoder_mlp_dim": 384}
    model = WordPooledConfig(**BODY | clean | sizes | {"encoder_dropout": 0.0, "prefixes": 1} | options)
    return Experiment(
        name=name,
        task=WordPooling(model=model),
        data=WordUnitText(tokenizer=tokenizer, length=48, max_units=max_units, **TEXT),
        train=train(steps),
    )


def plain(name: str, steps: int, tokenizer: str = CHARACTERS, length: int = 240, **options) -> Experiment:
    sizes = {"mlp_dim": 384, "max_length": length, "attention_dropout": 0.0}
    return Experiment(
        name=name,
        task=LanguageModeling(model=PlainConfig(**BODY | sizes | options)),
        data=NormalizedText(tokenizer=tokenizer, length=length, **TEXT),
        train=train(steps),
    )


RARE = tuple(f"next_word_accuracy_{bucket}" for bucket in ("0", "1_10", "11_100", "101_1000", "above_1000"))

config = Comparison(
    arms=(
        pooled("pooled", 500),
        plain("plain", 760),
        plain("plain_positions", 760, learned_positions=True),
        pooled("pooled_4_prefixes", 325, prefixes=4),
        pooled("pooled_bytes", 500, tokenizer="bytes"),
    ),
    measures=(NextWordAccuracy(batches=40),),
    columns=("bits_per_byte", "next_word_accuracy", "sampled_word_accuracy", *RARE),
    test_batches=40,
    title="Word-pooled and plain models",
    workdir="runs/word_pooled_study",
)
