"""A small Vision Transformer (arXiv 2010.11929) on scikit-learn's handwritten digits, enlarged to 16 x 16 pixels.

    jaxtok train vit_digits

It takes about half a minute on two cores. Expect an accuracy of about 0.97 on the validation split (measured: 0.976 of
210 images; 0.973 of the 183 of the test split, by `jaxtok eval runs/vit_digits --split test`). With --data.images
folder:PATH and --task.model.num-classes N it learns the classes of a folder.
"""

from jaxtok.data.images import ImageData
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.vision.classification import ImageClassification
from jaxtok.vision.vit import LinearViTConfig

config = Experiment(
    name="vit_digits",
    task=ImageClassification(
        model=LinearViTConfig(
            image_size=16, patch_size=4, num_classes=10, num_layers=3, d_model=64, num_heads=4, mlp_dim=128, pool="mean"
        )
    ),
    data=ImageData(images="digits", size=16, batch_size=64, flip=False),
    train=TrainConfig(
        steps=400,
        log_every=50,
        eval_every=200,
        checkpoint_every=200,
        optimizer=OptimizerConfig(learning_rate=2e-3, min_learning_rate=2e-5, warmup=0.05),
    ),
)
