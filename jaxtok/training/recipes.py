"""ByT5's weights for the beginning of a run."""

from __future__ import annotations

from pathlib import Path

import jax

from jaxtok.configuration import load_config
from jaxtok.interop import huggingface
from jaxtok.lm.mrt5 import MrT5Training, from_t5, new_controller
from jaxtok.lm.t5 import T5Config
from jaxtok.training.checkpoints import begin, load, must_be_free
from jaxtok.training.experiment import Experiment


def start_from_byt5(config: Experiment | Path | str, source: Path | str) -> Path:
    """Step 0 of a run with a ByT5's weights; `jaxtok train CONFIG` goes on from there.

    Args:
      config: the run's config file, or what it holds: a MrT5, or a ByT5.
      source: a Hugging Face folder, or a run of a ByT5 of the same size.

    Raises:
      FileExistsError: the run is there already.
      ValueError: the source is no T5, or of another size.
    """
    experiment = config if isinstance(config, Experiment) else load_config(config)
    source = Path(source)
    must_be_free(experiment.directory)
    if huggingface.is_folder(source):
        model, params = huggingface.read_folder(source)
    else:
        loaded = load(source)
        model, params = getattr(loaded.task, "model", None), loaded.params
    if not isinstance(model, T5Config):
        raise ValueError(f"{source} holds a {type(model).__name__}; give a ByT5.")
    task = experiment.task
    if isinstance(task, MrT5Training):
        params = from_t5(task.model, params, jax.random.key(experiment.train.seed))
        if task.target_rate:
            params["controller"] = new_controller()
    return begin(experiment, params)
