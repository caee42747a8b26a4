"""Byte2Word's claim on Python's standard library: words from bytes against BERT's table of subwords.

    jaxtok tokenizer runs/words_2k.model --vocab-size 2000 --model-type bpe --words
    jaxtok study byte2word_study

Both models are encoders of 3 layers of width 96 on rows of 48 words, and predict the pieces of the same masked words.
Measured are the loss of a word, how much it rises when words have errors, and how well a probe tells from which package
of the library a row comes. Expect 6.348 nats a word and 6.384 for BERT; configs/lm/README.md has the whole table.
"""

import dataclasses

from jaxtok.data.word_pieces import WordPieceText
from jaxtok.lm.bert import BertConfig
from jaxtok.lm.byte2word import Byte2WordConfig, ByteWords
from jaxtok.lm.whole_words import SubwordWords
from jaxtok.studies.comparison import Comparison
from jaxtok.studies.words import InputSize, PackageOfWords, WordNoise
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig

BODY = {
    "num_layers": 3,
    "d_model": 96,
    "num_heads": 4,
    "mlp_dim": 384,
    "dropout": 0.0,
    "vocab_size": 2048,
    "init_std": 0.1,
}
base = Experiment(
    name="Byte2Word",
    task=ByteWords(model=Byte2WordConfig(**BODY, max_length=48, pool_heads=4, max_pieces=4)),
    data=WordPieceText(tokenizer="runs/words_2k.model", length=48, batch_size=32, max_pieces=4, eval_limit=32),
    train=TrainConfig(
        steps=800,
        log_every=50,
        eval_every=200,
        checkpoint_every=2000,
        tensorboard=False,
        optimizer=OptimizerConfig(
            learning_rate=2e-3, min_learning_rate=0.0, schedule="linear", warmup=0.08, b2=0.98, weight_decay=0.01
        ),
    ),
)
bert = BertConfig(**BODY, max_positions=96, pooler=False, next_sentence=False)

config = Comparison(
    arms=(base, dataclasses.replace(base, name="BERT, whole words", task=SubwordWords(model=bert))),
    measures=(InputSize(), WordNoise(), PackageOfWords()),
    columns=("input_params", "nats_per_word", "bits_per_byte", "rise_10", "package_accuracy", "package_accuracy_10"),
    curve="nats_per_word",
    test_batches=128,
    title="Words from bytes, and from subwords",
    workdir="runs/byte2word_study",
)
