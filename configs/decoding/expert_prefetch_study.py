"""M2R2's prediction of experts in a small mixture of experts, and what loading them ahead would save (simulated).

    jaxtok study expert_prefetch_study

It trains a mixture of 8 layers and 8 experts on Python's standard library, and exits after 3 and 6 layers. Its tables
are the recall of predictions from the accelerated stream, from the slow one, and from the token before, and simulated
times. No hardware is measured.
"""

from jaxtok.data.text import TextData
from jaxtok.decoding.m2r2 import M2R2Config
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.studies.expert_prefetch import MixtureConfig, PrefetchStudy
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.m2r2 import M2R2, AddExits

task = LanguageModeling(
    model=MixtureConfig(
        num_layers=8,
        d_model=64,
        num_heads=4,
        mlp_dim=64,
        experts=8,
        top_k=2,
        vocab_size=0,
        max_length=256,
        tie_embeddings=True,
    )
)
exits = M2R2Config(gates=(3, 6), rank=8, latent=8)
data = TextData(length=128, batch_size=16, eval_limit=4)


def run(name: str, steps: int, **options: object) -> Experiment:
    optimizer = OptimizerConfig(learning_rate=3e-3, min_learning_rate=3e-4, warmup=0.05, weight_decay=0.0)
    train = TrainConfig(steps=steps, log_every=50, eval_every=200, checkpoint_every=100, optimizer=optimizer)
    return Experiment(name=name, data=data, train=train, mesh=MeshConfig(data=1), **options)


config = PrefetchStudy(
    base=run("base", 500, task=task),
    arm=run("exits", 200, task=M2R2(task=task, config=exits), start=AddExits(config=exits)),
)
