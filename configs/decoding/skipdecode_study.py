"""SkipDecode, early termination, constant skipping and a shallower model at equal mean layers, on Python's sources.

    jaxtok tokenizer runs/skipdecode_study/python.model --vocab-size 1024
    jaxtok study skipdecode_study

A model of 8 layers is trained for 400 steps; each arm then begins with it and is tuned for 160 steps under its
schedule, on the tokens after prompts of 64 tokens. Expect 3.50 nats a token with all layers and 3.62 with half of them
skipped (4.08 before tuning); the other arms were not measured yet. runs/skipdecode_study/layers.png shows them.
"""

import dataclasses

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


def arm(name: str, task: LanguageModeling, steps: int, rate: float, start: SkipLayers | None = None) -> Experiment:
    optimizer = OptimizerConfig(learning_rate=rate, min_learning_rate=rate / 10, warmup=0.05)
    every = {"eval_every": steps // 2, "checkpoint_every": steps, "log_every": 20}
    train = TrainConfig(steps=steps, optimizer=optimizer, tensorboard=False, **every)
    return Experiment(name=name, task=task, data=DATA, train=train, start=start)


def base(name: str, model: LlamaConfig) -> Experiment:
    return arm(name, LanguageModeling(model=model), STEPS, 2e-3)


def tuned(name: str, high: int, low: int, model: LlamaConfig = MODEL, **options) -> Experiment:
    schedule = Schedule(max_layers=high, min_layers=low, prompt=64, length=160, **options)
    task = SkipDecoding(model=model, schedule=schedule)
    return arm(name, task, TUNING, 5e-4, SkipLayers(schedule=schedule))


config = SkipStudy(
    arms=(
        base("base", MODEL),
        tuned("all layers", LAYERS, LAYERS),
        tuned("skip, 5 to 3", 5, 3),
        tuned("termination, 5 to 3", 5, 3, skip="top"),
        tuned("constant skip of 4", 4, 4),
        tuned("skip, 3 to 2", 3, 2),
        tuned("termination, 3 to 2", 3, 2, skip="top"),
        base("base of 4 layers", SHALLOW),
        tuned("4 layers", 4, 4, SHALLOW),
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
