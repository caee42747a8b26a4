"""A run that takes a second: one block of width 16 on a folder of text."""

import dataclasses

import pytest

from jaxtok.data.text import TextData
from jaxtok.lm.language_modeling import LanguageModeling
from jaxtok.lm.tokenformer import TokenFormerConfig, uniform_counts
from jaxtok.training.experiment import Experiment, TrainConfig
from jaxtok.training.loop import train
from jaxtok.training.mesh import MeshConfig
from jaxtok.training.optimizer import OptimizerConfig
from jaxtok.transfer.growth import Growth


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of a hundred small documents, of which some are in each split."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(100):
        (folder / f"{i}.txt").write_text(f"document {i} says: " + f"{i * i} and {i % 7}, " * 8)
    return folder


@pytest.fixture
def experiment(corpus, tmp_path):
    """Six steps, a growth, four steps."""
    return tiny(corpus, tmp_path / "run")


def tiny(corpus, workdir):
    return Experiment(
        name="tiny",
        task=LanguageModeling(
            model=TokenFormerConfig(
                num_layers=2, d_model=16, num_heads=2, rotary_fraction=0.5, tokens=uniform_counts(8, 16), max_length=64
            )
        ),
        data=TextData(corpus=str(corpus), length=16, batch_size=4, shuffle_window=8, eval_limit=2),
        train=TrainConfig(
            steps=6,
            log_every=1,
            eval_every=5,
            checkpoint_every=2,
            keep_checkpoints=20,
            optimizer=OptimizerConfig(learning_rate=1e-2, min_learning_rate=1e-3),
            tensorboard=False,
        ),
        mesh=MeshConfig(data=1),
        stages=(Growth(to=uniform_counts(12, 24), steps=4, optimizer="keep"),),
        workdir=str(workdir),
    )


@pytest.fixture
def short(experiment):
    """The same without growth."""
    return dataclasses.replace(experiment, stages=())


@pytest.fixture(scope="session")
def finished(corpus, tmp_path_factory):
    """A run of six steps, saved at 2, 4 and 6; to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(dataclasses.replace(tiny(corpus, folder), stages=()), quiet=True)
    return folder
