"""Mamba (arXiv 2312.00752): language models without attention, of the published sizes, on the Pile.

    jaxtok train mamba_130m --data.corpus arrayrecord:/path/to/records

The paper trains on 300B tokens in rows of 2,048, and reports perplexities on the Pile (average of seven tasks) of 10.56
(44.7 %) for 130M, 8.28 (50.0 %) for 370M, 7.33 (57.1 %) for 790M, 6.80 (59.7 %) for 1.4B and 6.22 (63.3 %) for 2.8B.

mamba_130m  129,135,360 parameters
mamba_370m  371,516,416 parameters
mamba_790m  793,204,224 parameters
mamba_1_4b  1,372,178,432 parameters, and batches of 1M tokens instead of 0.5M
mamba_2_8b  2,768,345,600 parameters; its recipe is our guess: that of 1.4b at the rate of GPT-3's size times five
mamba_small  a byte model of 0.1M parameters on Python's standard library; about five minutes on two cores
"""

import dataclasses

from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.mamba import PUBLISHED, MambaConfig
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig

RATES = {"130m": 3e-3, "370m": 1.5e-3, "790m": 1.25e-3, "1.4b": 1e-3, "2.8b": 8e-4}


def mamba(size: str) -> Experiment:
    model = dataclasses.replace(PUBLISHED[size], dtype="bfloat16", remat="full")
    rows = 512 if size in ("1.4b", "2.8b") else 256
    return Experiment(
        name=f"mamba_{size}".replace(".", "_"),
        task=LanguageModeling(model=model),
        data=TextData(
            corpus="arrayrecord:data/pile",
            tokenizer="data/gpt-neox-20b/tokenizer.json",
            length=2048,
            batch_size=rows,
            eval_limit=16,
            workers=8,
            streams=64,
        ),
        train=TrainConfig(
            steps=300 * 10**9 // (2048 * rows),
            optimizer=OptimizerConfig(learning_rate=RATES[size], min_learning_rate=1e-5),
            log_every=20,
            eval_every=1000,
            checkpoint_every=1000,
        ),
        mesh=MeshConfig(fsdp=16),
    )


def small() -> Experiment:
    return Experiment(
        name="mamba_small",
        task=LanguageModeling(
            model=MambaConfig(num_layers=2, d_model=64, state_size=8, vocab_size=384, max_length=1024)
        ),
        data=TextData(length=128, batch_size=16, eval_limit=32),
        train=TrainConfig(
            steps=1000,
            log_every=50,
            eval_every=250,
            checkpoint_every=500,
            optimizer=OptimizerConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup=0.05),
        ),
        mesh=MeshConfig(data=1),
    )


configs = {
    "mamba_130m": lambda: mamba("130m"),
    "mamba_370m": lambda: mamba("370m"),
    "mamba_790m": lambda: mamba("790m"),
    "mamba_1_4b": lambda: mamba("1.4b"),
    "mamba_2_8b": lambda: mamba("2.8b"),
    "mamba_small": small,
}
