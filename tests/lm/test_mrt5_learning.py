"""The paper's claim at a small size: a gate that is trained deletes what the task can do without."""

from __future__ import annotations

import pydoc_data.topics

import jax
import numpy as np
import pytest

from jaxtok.data.character_edits import VOWELS, CharacterEdits
from jaxtok.lm.mrt5 import MrT5Training, begin, mrt5
from jaxtok.lm.t5 import T5Config
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig

STEPS = 1200
BASE = T5Config(
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


def prose(folder):
    """Python's documentation of its language, 465,000 characters."""
    path = folder / "topics.txt"
    path.write_text("\n".join(pydoc_data.topics.topics.values()))
    return CharacterEdits(corpus=str(path), length=41, lower=True, batch_size=24, eval_limit=20)


def trained(folder, data, **task):
    options = {"reduction": task.pop("reduction", "gate"), "amount": 0.27}
    optimizer = OptimizerConfig(
        learning_rate=2e-3,
        min_learning_rate=0.0,
        schedule="linear",
        warmup=0.0,
        b2=0.999,
        weight_decay=0.01,
        clip=0.0,
    )
    experiment = Experiment(
        task=MrT5Training(model=mrt5(BASE, gate_layer=2, softmax1=True, **options), hard_probability=0.5, **task),
        data=data,
        train=TrainConfig(steps=STEPS, optimizer=optimizer, eval_every=0, checkpoint_every=STEPS, tensorboard=False),
        mesh=MeshConfig(data=1),
        workdir=str(folder),
    )
    result = train(experiment, quiet=True)
    found = {}
    for deletion in ("hard", "soft"):
        found[deletion] = result.task.evaluate(result.params, data.eval_batches("test"), deletion=deletion)
    return result, found


@pytest.mark.slow
def test_a_gate_finds_the_vowels(tmp_path):
    """Texts without their vowels: against random deletion of as many bytes as are vowels, with the same steps."""
    data = prose(tmp_path)
    result, found = trained(tmp_path / "gate", data, target_rate=0.25, k_i=1e-3, regulariser_delay=int(0.3 * STEPS))
    _, of_random = trained(tmp_path / "random", data, reduction="random")
    vowels = real = deleted = vowels_deleted = 0
    ids = np.frombuffer(VOWELS, np.uint8) + 3
    for batch in data.eval_batches("test"):
        begun, _ = begin(result.task, result.params, batch["tokens"], jax.random.key(0))
        mask, gone = np.asarray(begun.mask), np.asarray(begun.mask & ~begun.kept)
        is_vowel = np.isin(batch["tokens"], ids) & mask
        vowels, real = vowels + is_vowel.sum(), real + mask.sum()
        deleted, vowels_deleted = deleted + gone.sum(), vowels_deleted + (gone & is_vowel).sum()
    share, rate = vowels_deleted / deleted, vowels / real
    print({"found": found, "random": of_random, "vowels among deleted": share, "vowels": rate})
    assert found["hard"]["deletion_rate"] > 0.2
    assert found["hard"]["loss"] < 0.75 * of_random["hard"]["loss"]
    assert abs(found["hard"]["loss"] - found["soft"]["loss"]) < 0.05
    assert share > 1.8 * rate
