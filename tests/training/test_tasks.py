"""What every Task promises beside training, which tests/training/test_mesh.py looks at."""

import jax
import numpy as np
import pytest
from tasks import TASKS

from jaxtok.training.mesh import unboxed


@pytest.mark.parametrize("name", TASKS)
def test_evaluation_is_a_mean_over_what_counts(name):
    """Two batches that are the same have the loss of one; and the numbers are plain ones."""
    case = TASKS[name]()
    params = unboxed(jax.jit(case.task.init)(jax.random.key(0), case.batch))
    once = case.task.evaluate(params, [case.batch])
    twice = case.task.evaluate(params, [case.batch, case.batch])
    assert once.keys() == twice.keys() and all(isinstance(number, float) for number in once.values())
    assert 0 < once["loss"] < 100 and np.isfinite(list(once.values())).all()
    # what is drawn (masks, tables, gates) depends on the number of the batch
    drawn = name in ("electra", "masked_words", "byte2word", "bert_whole_words", "lexinvariant", "elm_masked", "bae")
    assert twice["loss"] == pytest.approx(once["loss"], rel=0.5 if drawn else 1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_work_is_counted(name):
    case = TASKS[name]()
    assert case.task.flops(case.batch) > 1000
