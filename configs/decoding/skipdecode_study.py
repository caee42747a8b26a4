"""SkipDecode, early termination, constant skipping and a shallower model at equal mean layers, on Python's sources.

    jaxtok tokenizer runs/skipdecode_study/python.model --vocab-size 1024
    jaxtok study skipdecode_study

A model of 8 layers is trained for 400 steps; each arm then begins with it and is tuned for 160 steps under its
schedule, on the tokens after prompts of 64 tokens. A model of 4 layers is trained for 400 steps and then for 160 on the
same tokens, at the rate of the beginning. Expect 3.50 nats a token with all layers and 3.62 with half of them skipped
(4.08 before tuning); the other arms were not measured yet. runs/skipdecode_study/layers.png shows them.
"""

import dataclasses
from typing import Any

from jaxtok.data.text import TextData
from jaxtok.decoding.skipdecode import Schedule
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.studies.skipdecode import ByPosition, Layers, SkipStudy
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.skipdecode import SkipDecoding, SkipLayers

LAYERS, STEPS, TUNING = 8, 400, 160
MODEL = LlamaConfig(
    num_layers=LAYERS, d_model=96, num_heads=4, mlp_dim=256, vocab_size=1024, max_length=256, tie_embeddings=True
)
SHALLOW = dataclasses.replace(MODEL, num_layers=4)
DATA = TextData(
    tokenizer="runs/skipdecode_study/python.model", length=160, batch_size=12, isolate_documents=False, eval_limit=8
)


def settings(steps: int, rate: float) -> TrainConfig:
    optimizer = OptimizerConfig(learning_rate=rate, min_learning_rate=rate / 10, warmup=0.05)
    every = {"eval_every": steps // 2, "checkpoint_every": 100, "log_every": 20}
    return TrainConfig(steps=steps, optimizer=optimizer, tensorboard=False, **every)


def model(name: str, size: LlamaConfig, **options: Any) -> Experiment:
    return Experiment(name=name, task=LanguageModeling(model=size), data=DATA, train=settings(STEPS, 2e-3), **options)


def scheduled(high: int, low: int, **options: Any) -> Schedule:
    return Schedule(max_layers=high, min_layers=low, prompt=64, length=160, **options)


def tuned(name: str, high: int, low: int, **options: Any) -> Experiment:
    schedule = scheduled(high, low, **options)
    task, start = SkipDecoding(model=MODEL, schedule=schedule), SkipLayers(schedule=schedule)
    return Experiment(name=name, task=task, data=DATA, train=settings(TUNING, 5e-4), start=start)


config = SkipStudy(
    base=model("base", MODEL),
    arms=(
        tuned("all layers", LAYERS, LAYERS),
        tuned("SkipDecode, 5 to 3", 5, 3),
        tuned("early termination, 5 to 3", 5, 3, skip="top"),
        tuned("constant skip, 4", 4, 4),
        tuned("SkipDecode, 3 to 2", 3, 2),
        tuned("early termination, 3 to 2", 3, 2, skip="top"),
        model("shallower model, 4", SHALLOW, stages=(SkipLayers(schedule=scheduled(4, 4), steps=TUNING),)),
    ),
    measures=(Layers(), ByPosition()),
    columns=(
        "layers",
        "layer_speedup",
        "flop_speedup",
        "untuned",
        "loss",
        "first",
        "quarter_1",
        "quarter_4",
    ),
    curve="loss",
    test_batches=24,
    title="SkipDecode and its baselines",
    workdir="runs/skipdecode_study",
)
