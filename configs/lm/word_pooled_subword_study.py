"""Word pooling of subwords against a plain model of subwords, on the words of Python's standard library.

    jaxtok tokenizer runs/python_1024.model --corpus python --vocab-size 1024 --model-type bpe
    jaxtok study word_pooled_subword_study

Everything else is as in word_pooled_study. Expect 2.707 bits a character for the pooled model and 2.177 for the plain
one.
"""

import dataclasses

from jaxtok.configuration import load_config

TOKENIZER = "runs/python_1024.model"
study = load_config("word_pooled_study")
arms = {arm.name: arm for arm in study.arms}


def subwords(arm, name, steps, length, **sizes):
    model = dataclasses.replace(arm.task.model, vocab_size=1024, **sizes)
    task = dataclasses.replace(arm.task, model=model)
    data = dataclasses.replace(arm.data, tokenizer=TOKENIZER, length=length)
    if hasattr(task, "tokenizer"):
        task = dataclasses.replace(task, tokenizer=TOKENIZER)
        data = dataclasses.replace(data, max_units=model.max_units)
    train = dataclasses.replace(arm.train, steps=steps, eval_every=steps // 4, checkpoint_every=steps)
    return dataclasses.replace(arm, name=name, task=task, data=data, train=train)


config = dataclasses.replace(
    study,
    arms=(
        subwords(arms["pooled"], "pooled_subwords", 500, 48, max_units=6),
        subwords(arms["plain_positions"], "plain_subwords", 1300, 96, max_length=96),
    ),
    title="Word-pooled and plain models of subwords",
    workdir="runs/word_pooled_subword_study",
)
