"""MrT5 (arXiv 2410.20771) against a ByT5 and against random deletion, on Python's standard library.

    jaxtok study mrt5_study

The task is to write 63 bytes of a text again without their vowels, the paper's first diagnostic: unlike span
corruption, it makes models that train for minutes use their inputs. As in the paper's pre-training, one ByT5 is trained
first, and each arm starts from its weights: without deletion, with a gate that is controlled to delete a part of the
bytes, and with random deletion. (A target of 80 % made the gate delete whole batches, because most bytes must be
copied.) `bits per byte` is measured with deleted bytes taken out, `soft bits per byte` as in training; the speed-ups
are those of the encoder on rows of 1,024 bytes. Expect 0.327 bits per byte for ByT5 and 0.422 for a target of 25 %;
configs/lm/README.md has the whole table.
"""

from jaxtok.data.character_edits import CharacterEdits
from jaxtok.lm.mrt5 import MrT5Training, mrt5
from jaxtok.lm.mrt5_baselines import RandomDeletion
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
reducing = mrt5(byt5, gate_layer=2, softmax1=True)


def arm(name, task, steps=300, rate=1e-3):
    # b2 is Adam's usual one; with a smaller one, the gate runs away before the model has learned to use its input.
    optimizer = OptimizerConfig(
        learning_rate=rate, min_learning_rate=0.0, schedule="linear", warmup=0.0, b2=0.999, weight_decay=0.01, clip=0.0
    )
    return Experiment(
        name=name,
        task=task,
        data=CharacterEdits(corpus="python", length=64, batch_size=24, eval_limit=8),
        train=TrainConfig(steps=steps, optimizer=optimizer, eval_every=steps // 3, checkpoint_every=steps),
        mesh=MeshConfig(data=1),
    )


def deleting(rate):
    return MrT5Training(model=reducing, target_rate=rate, k_i=1e-3, hard_probability=0.5)


without_gate = mrt5(reducing, RandomDeletion, amount=0.5)
config = Continued(
    base=arm("base", SequenceToSequence(model=byt5), steps=1500, rate=2e-3),
    arms=(
        arm("ByT5", SequenceToSequence(model=byt5)),
        arm("MrT5, target 25 %", deleting(0.25)),
        arm("MrT5, target 50 %", deleting(0.5)),
        arm("random, 50 %", MrT5Training(model=without_gate, hard_probability=0.5)),
    ),
    measures=(SoftDeletion(batches=16), EncoderSpeed()),
    columns=("bits_per_byte", "soft_bits_per_byte", "deletion_rate", "speedup_50", "speedup_80"),
    test_batches=16,
    title="MrT5 and ByT5",
    workdir="runs/mrt5_study",
)
