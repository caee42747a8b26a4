"""A small decoder and then its exits by M2R2 (arXiv 2502.02040), in one run: the model, the adapters, the router.

    jaxtok train m2r2_small
    jaxtok generate runs/m2r2_small --prompt "def "     # drafts by the first exit

m2r2_small  8 layers of width 128
    It trains a Llama on Python's standard library, freezes it, trains adapters of rank 16 up to the gates after 3 and 5
    layers, and then the router. Expect the exits' agreement with the model to grow from the logit lens's; m2r2_study
    and m2r2_deep_study have the comparison.
"""

from jaxtok.data.text import TextData
from jaxtok.decoding.m2r2 import M2R2Config
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.m2r2 import AddExits, TrainRouter


def m2r2_small() -> Experiment:
    return Experiment(
        name="m2r2_small",
        task=LanguageModeling(
            model=LlamaConfig(
                num_layers=8, d_model=128, num_heads=4, mlp_dim=384, vocab_size=0, max_length=256, tie_embeddings=True
            )
        ),
        data=TextData(length=128, batch_size=16, eval_limit=8),
        train=TrainConfig(
            steps=800,
            eval_every=125,
            checkpoint_every=125,
            optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=2e-4, warmup=0.05, weight_decay=0.0),
        ),
        stages=(AddExits(config=M2R2Config(gates=(3, 5), rank=16, latent=16), steps=250), TrainRouter(steps=100)),
    )


configs = {"m2r2_small": m2r2_small}
