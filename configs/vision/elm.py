"""ELM (arXiv 2410.16257): a Llama on the codes of a binary autoencoder, 2M steps of 256 images of ImageNet.

    jaxtok train elm_l --data.path CODES

CODES is a folder of codes that `jaxtok vision tokenize` has written, by a binary autoencoder of 20 bits, or of 24 where
the sub-codes have 12. For T sub-codes of K bits, give --task.model.sub-codes T --task.model.code-bits K
--data.sub-codes T --data.code-bits K, and codes of T x K bits. FIDs are on ImageNet at 256 x 256 (pytorch_fid, 50,000
samples); nats are read off the authors' plot.

elm_b  90M parameters on 2 sub-codes of 10 bits; no number of this size is known
elm_l  316M parameters on 2 sub-codes of 10 bits: FID 15.95 without guidance
elm_xl  741M parameters on 2 sub-codes of 10 bits: FID 12.70 without guidance
elm_xxl  1,391M parameters on 2 sub-codes of 12 bits: FID 10.11 without guidance, about 6.40 nats a sub-code
elm_2b  1,909M parameters on 2 sub-codes of 12 bits: FID 1.54 with guidance, about 6.39 nats after 1.3M steps
elm_xxxl  3,864M parameters on 2 sub-codes of 12 bits; no number of this size is known
"""

import dataclasses

from jaxtok.data.codes import CodeData
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.elm import PUBLISHED, ElmModeling


def elm(size: str, fsdp: int = 8) -> Experiment:
    """AdamW 0.9/0.95 at a constant 1e-4, decay 0.05 of everything but norms, clip 1, 256 images a step, 400 epochs of
    ImageNet; dropout 0.1, also of classes.

    The authors' decay includes the tables, as here. Their samples are made with a moving average of the parameters
    (0.9999).
    """
    model = dataclasses.replace(PUBLISHED[f"elm-{size}"], dtype="bfloat16", remat="projections", loss_chunk=32)
    return Experiment(
        name=f"elm_{size}",
        task=ElmModeling(model=model),
        data=CodeData(
            path=f"data/imagenet256_{model.sub_codes * model.code_bits}_bits",
            grid=model.grid,
            sub_codes=model.sub_codes,
            code_bits=model.code_bits,
            batch_size=256,
            eval_limit=40,
        ),
        train=TrainConfig(
            steps=2_000_000,
            optimizer=OptimizerConfig(
                learning_rate=1e-4,
                min_learning_rate=1e-4,
                schedule="constant",
                warmup=0.0,
                weight_decay=0.05,
                ema_decay=0.9999,
            ),
            log_every=100,
            eval_every=10_000,
            checkpoint_every=10_000,
            keep_checkpoints=3,
        ),
        mesh=MeshConfig(fsdp=fsdp),
    )


configs = {
    "elm_b": lambda: elm("b"),
    "elm_l": lambda: elm("l"),
    "elm_xl": lambda: elm("xl"),
    "elm_xxl": lambda: elm("xxl", fsdp=16),
    "elm_2b": lambda: elm("2b", fsdp=16),
    "elm_xxxl": lambda: elm("xxxl", fsdp=32),
}
