"""TokenUnify in small: ways of pre-training on volumes, then segmentation with few labels.

    jaxtok study tokenunify_study
    jaxtok study tokenunify_study --volumes volume:TRAIN.h5 --labels volume:LABELS.h5 --test-volumes volume:TEST.h5
        --test-labels volume:TEST_LABELS.h5

By default the volumes are generated (`jaxtok.data.volumes.toy_volume`). An arm takes one to two minutes on a busy core;
the page of the family has what was measured on electron microscopy.
"""

from jaxtok.data.volumes import VolumeData
from jaxtok.studies.tokenunify import VolumeStudy
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.tokenunify import AffinityPrediction, PatchConfig, ToAffinities, VolumePretraining

CROP = (16, 48, 48)
unlabelled = VolumeData(crop=CROP, batch_size=4)
labelled = VolumeData(crop=CROP, batch_size=4, toy_volumes=2)


def train(steps, rate):
    optimizer = OptimizerConfig(
        learning_rate=rate, min_learning_rate=0.0, schedule="cosine", warmup=0.02, b2=0.999, weight_decay=0.0, clip=1.0
    )
    return TrainConfig(
        steps=steps, optimizer=optimizer, log_every=100, eval_every=0, checkpoint_every=steps, tensorboard=False
    )


def pretraining(name, **options):
    model = PatchConfig(crop=CROP, expand=1.0, decoder_layers=1 if name == "autoencoder" else 0)
    return Experiment(
        name=name,
        task=VolumePretraining(model=model, fill="zero", **options),
        data=unlabelled,
        train=train(200, 2e-3),
    )


config = VolumeStudy(
    pretraining=(
        pretraining("random", schedule="random"),
        pretraining("next", schedule="next"),
        pretraining("next_all", schedule="next_all"),
        pretraining("mixture", schedule="phases"),
        pretraining("autoencoder", objective="autoencoder", mask_ratio=(0.75, 0.75)),
    ),
    finetuning=Experiment(
        name="affinities",
        task=AffinityPrediction(model=PatchConfig(crop=CROP, expand=1.0, out_channels=3)),
        data=labelled,
        train=train(300, 1e-3),
        start=ToAffinities(),
    ),
    seeds=(0, 1, 2, 3, 4),
)
