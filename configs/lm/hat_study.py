"""HAT against Transformers on bytes and on subwords, at equal training compute, on Python's own sources.

    jaxtok tokenizer runs/hat_study/python.model --vocab-size 2048
    jaxtok study hat_study

All models have a body of 4 layers of width 128. Compute is counted with the padding of HAT's words. Expect HAT to be
better than the model of bytes (2.8 bits per byte against 3.4, with one seed) and worse than that of subwords (2.1),
which starts better.
"""

from jaxtok.data.noise import Noise
from jaxtok.data.text import TextData
from jaxtok.data.words import WordText
from jaxtok.lm.hat import HATConfig, HATModeling
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.nn.linear import LlamaStack
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.robustness import Robustness
from jaxtok.tokenizers.words import WordSplitter
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig

BODY = {"num_layers": 4, "d_model": 128, "num_heads": 4, "mlp_dim": 344}
words = WordSplitter("whitespace", 16)
optimizer = OptimizerConfig(learning_rate=2e-3, min_learning_rate=2e-4, warmup=0.05)


def arm(name, task, data, steps):
    every = steps // 4
    train = TrainConfig(steps=steps, optimizer=optimizer, log_every=20, eval_every=every, checkpoint_every=every)
    return Experiment(name=name, task=task, data=data, train=train)


def flat(length, tokenizer, vocab):
    model = LlamaConfig(**BODY, vocab_size=vocab, max_length=length)
    return LanguageModeling(model=model), TextData(tokenizer=tokenizer, length=length, batch_size=8, eval_limit=16)


config = Comparison(
    title="HAT and flat Transformers on Python's sources",
    arms=(
        arm(
            "HAT",
            HATModeling(model=HATConfig(backbone=LlamaStack(**BODY)), splitter=words),
            WordText(length=64, batch_size=8, splitter=words, eval_limit=16),
            330,
        ),
        arm("bytes", *flat(256, "bytes", 384), 220),
        arm("SentencePiece 2k", *flat(128, "runs/hat_study/python.model", 2048), 410),
    ),
    measures=(
        Robustness(
            noises=(Noise("swap"), Noise("substitute"), Noise("drop"), Noise("upper"), Noise("any", of="words")),
            splitter=words,
            bytes=80_000,
        ),
    ),
    columns=(
        "bits_per_byte",
        "bits_per_byte_swap_0.1",
        "bits_per_byte_substitute_0.1",
        "bits_per_byte_drop_0.1",
        "bits_per_byte_upper",
        "bits_per_byte_any_0.1_of_words",
        "word_accuracy",
        "word_accuracy_swap_0.1",
        "word_accuracy_upper",
    ),
    test_batches=4,
    workdir="runs/hat_study",
)
