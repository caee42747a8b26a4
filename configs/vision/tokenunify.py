"""TokenUnify (arXiv 2405.16847) on your own volumes: a network pre-trained without labels, then fine-tuned.

    jaxtok train tokenunify_random --data.volumes volume:A.h5 volume:B.h5
    jaxtok train tokenunify_joint --data.volumes volume:A.h5 volume:B.h5 --start runs/tokenunify_random
    jaxtok train tokenunify_affinities --data.volumes volume:C.h5 --data.labels volume:C_LABELS.h5
        --start runs/tokenunify_joint

This is the order of the authors' code: random prediction, then next and next-all together, then affinities. Their
classes differ in the kernel of the U-net, so that 19.66M of 28.30M parameters start anew in fine-tuning; here both
stages have kernel 5, and only the 99 of the last convolution do (the head for the next token is left behind).

tokenunify_random           random tokens are hidden (first stage); 28M parameters, batch 320, 800 epochs of 20 batches
tokenunify_joint            the rest after a prefix, and its first token (second stage), batch 160
tokenunify_mixture          the paper's phases: one of the three tasks is drawn at each step
tokenunify_autoencoder      the baseline: hidden tokens only
tokenunify_affinities       fine-tuning, batch 48; published on Wafer 4: VOI 0.9951, 1.7839 from scratch
tokenunify_affinities_huge  the largest network, 1,009M parameters; VOI 0.96 by the authors' figure
"""

import dataclasses

from jaxtok.data.volumes import VolumeData
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.tokenunify import PUBLISHED, AffinityPrediction, ToAffinities, VolumePretraining

COMPUTE = {"dtype": "bfloat16", "remat": True}
NETWORK = dataclasses.replace(PUBLISHED["tokenunify-base"], **COMPUTE)


def train(steps, rate, batch, least=0.0):
    optimizer = OptimizerConfig(
        learning_rate=rate * batch / 256, min_learning_rate=least, warmup=0.0, weight_decay=0.05, clip=0.0
    )
    return TrainConfig(steps=steps, optimizer=optimizer, log_every=50, eval_every=1000, checkpoint_every=1000)


def pretraining(name, batch, **options):
    model = dataclasses.replace(NETWORK, out_channels=1, next_head=True)  # in all stages, so that one starts another
    perturbations = ("intensity", "noise", "blur", "missing")
    return Experiment(
        name=name,
        task=VolumePretraining(model=model, **options),
        data=VolumeData(batch_size=batch, perturbations=perturbations, workers=8, toy_shape=(24, 176, 176)),
        train=train(16_000, 1e-3, batch),
    )


def random():
    return pretraining("tokenunify_random", 320, schedule="random")


def joint():
    return pretraining("tokenunify_joint", 160, schedule="joint")


def mixture():
    return pretraining("tokenunify_mixture", 160, schedule="phases")


def autoencoder():
    return pretraining("tokenunify_autoencoder", 160, objective="autoencoder", mask_ratio=(0.75, 0.75))


def affinities(name="tokenunify_affinities", size="tokenunify-base", mesh=None):
    model = dataclasses.replace(PUBLISHED[size], **COMPUTE)
    return Experiment(
        name=name,
        task=AffinityPrediction(model=model),
        data=VolumeData(batch_size=48, workers=8, toy_shape=(24, 176, 176)),
        train=train(400 * 208, 1e-4, 48, 1e-6),
        mesh=mesh or MeshConfig(),
        start=ToAffinities(),
    )


def huge():
    return affinities("tokenunify_affinities_huge", "tokenunify-huge", MeshConfig(data=-1, fsdp=8))


configs = {
    "tokenunify_random": random,
    "tokenunify_joint": joint,
    "tokenunify_mixture": mixture,
    "tokenunify_autoencoder": autoencoder,
    "tokenunify_affinities": affinities,
    "tokenunify_affinities_huge": huge,
}
