"""MrT5 (arXiv 2410.20771) against a ByT5 and against random deletion, on Python's standard library.

    jaxtok study configs/lm/mrt5_study.py

Span corruption of rows of 128 bytes. As in the paper, one ByT5 is trained first, and each arm goes on from its weights:
without deletion, with a gate that is controlled to delete 50 or 80 % of the bytes, and with random deletion. `bits per
byte` is with deleted bytes taken out, `soft bits per byte` as in training; the speed-ups are of the encoder, at rows of
1,024 bytes. What to expect: the README's table.
"""

import dataclasses

from jaxtok.data.span_corruption import SpanCorruption
from jaxtok.lm.mrt5 import MrT5Training, mrt5
from jaxtok.lm.t5 import SequenceToSequence, T5Config
from jaxtok.studies.deletion import Continued, EncoderSpeed, SoftDeletion
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig

byt5 = T5Config(
    num_layers=4,
    decoder_layers=2,
    d_model=64,
    num_heads=4,
    head_size=16,
    mlp_dim=128,
    vocab_size=384,
    gated=True,
    activation="gelu_tanh",
    tie_embeddings=False,
    scale_outputs=False,
    depth_scaled_init=True,
)
reducing = mrt5(byt5, gate_layer=1, softmax1=True)


def arm(name, task, steps=400, rate=1e-3):
    optimizer = OptimizerConfig(
        learning_rate=rate, min_learning_rate=0.0, schedule="linear", warmup=0.05, b2=0.99, weight_decay=0.0
    )
    return Experiment(
        name=name,
        task=task,
        data=SpanCorruption(length=128, batch_size=16, mean_span=5.0, eval_limit=8),
        train=TrainConfig(steps=steps, optimizer=optimizer, eval_every=steps // 4, checkpoint_every=steps),
        mesh=MeshConfig(data=1),
    )


def deleting(rate):
    return MrT5Training(model=reducing, target_rate=rate, k_i=1e-3, hard_probability=0.25)


without_gate = dataclasses.replace(reducing, reduction="random", amount=0.5)
config = Continued(
    base=arm("base", SequenceToSequence(model=byt5), steps=1500, rate=3e-3),
    arms=(
        arm("ByT5", SequenceToSequence(model=byt5)),
        arm("MrT5, target 50 %", deleting(0.5)),
        arm("MrT5, target 80 %", deleting(0.8)),
        arm("random, 50 %", MrT5Training(model=without_gate, hard_probability=0.25)),
    ),
    measures=(SoftDeletion(batches=16), EncoderSpeed()),
    columns=("bits_per_byte", "soft_bits_per_byte", "deletion_rate", "speedup_50", "speedup_80"),
    test_batches=16,
    title="MrT5 and ByT5",
    workdir="runs/mrt5_study",
)
