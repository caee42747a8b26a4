"""M2R2's exits beside a head with as many parameters and the logit lens, on a frozen model of 4 and of 8 layers.

    jaxtok study m2r2_study
    jaxtok study m2r2_deep_study

Each trains a small Llama on Python's standard library, freezes it, and trains each kind of exit for 250 steps and its
router for 100 more. A study goes on where it was interrupted.

m2r2_study  4 layers, one gate after 2. Expect 0.70 agreement of M2R2 and of the head with the model and 0.56 of the
    logit lens, and 3.5, 3.6 and 2.8 tokens a round with 5 drafts.
m2r2_deep_study  8 layers, gates after 3 and 5
"""

from jaxtok.data.text import TextData
from jaxtok.decoding.m2r2 import M2R2Config
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.llama import LlamaConfig
from jaxtok.studies.exits import EarlyExits, ExitStudy, Rounds, Routers, Velocity
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.m2r2 import M2R2, AddExits, TrainRouter


def study(name: str, layers: int, gates: tuple[int, ...], base_steps: int, steps: int = 250) -> ExitStudy:
    model = LlamaConfig(
        num_layers=layers, d_model=128, num_heads=4, mlp_dim=384, vocab_size=0, max_length=256, tie_embeddings=True
    )
    task = LanguageModeling(model=model)
    data = TextData(length=128, batch_size=16, eval_limit=8)

    def settings(steps: int, rate: float) -> TrainConfig:
        optimizer = OptimizerConfig(learning_rate=rate, min_learning_rate=rate / 10, warmup=0.05, weight_decay=0.0)
        return TrainConfig(steps=steps, log_every=50, eval_every=125, checkpoint_every=125, optimizer=optimizer)

    base = Experiment(name="base", task=task, data=data, train=settings(base_steps, 2e-3), mesh=MeshConfig(data=1))

    def arm(name: str, **options: str) -> Experiment:
        config = M2R2Config(gates=gates, rank=16, latent=16, gamma=3, **options)
        if config.exits == "lens":  # which has only a router
            tuned, more, after = M2R2(task=task, config=config, train="router"), 100, ()
        else:
            tuned, more, after = M2R2(task=task, config=config), steps, (TrainRouter(steps=100),)
        start = AddExits(config=config)
        train = settings(more, 3e-3)
        return Experiment(name=name, task=tuned, data=data, train=train, mesh=base.mesh, start=start, stages=after)

    first = gates[0]
    per_gate = [f"{name}_{end}" for end in gates for name in ("agreement", "kl", "auroc", "auroc_confidence")]
    return ExitStudy(
        base=base,
        arms=(
            arm("logit lens", exits="lens"),
            arm("head", exits="head"),
            arm("M2R2", exits="accelerated"),
            arm("M2R2, linear router", exits="accelerated", router="linear"),
        ),
        measures=(Rounds(), Routers(), EarlyExits(), EarlyExits(by="confidence"), Velocity()),
        columns=(
            *per_gate,
            "expected_tokens",
            *(f"{what}_{gamma}" for gamma in (3, 5) for what in ("tokens_a_round", "prompt_lookup", "flops_a_token")),
            "same_text",
            *(f"{what}_router_{threshold}" for threshold in (0.5, 0.7, 0.9) for what in ("layers", "same")),
        ),
        curve=f"agreement_{first}",
        test_batches=32,
        title=f"Exits of a model of {layers} layers",
        workdir=f"runs/{name}",
    )


configs = {
    "m2r2_study": lambda: study("m2r2_study", 4, (2,), base_steps=800),
    "m2r2_deep_study": lambda: study("m2r2_deep_study", 8, (3, 5), base_steps=800),
}
