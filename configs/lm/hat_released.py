"""The released HAT (arXiv 2603.15953) of 7B, trained from scratch on rows of 3,584 words.

    jaxtok train hat_released_7b --data.corpus arrayrecord:/path/to/records

Its authors trained on about 4T words (70 % English, 7 % German, code and mathematics) with a context of 3,500 words.
The data, the batch and the optimizer are not public, so those of hat_7b are used. A row has room for seven bytes a
word. No loss of this training is published; `jaxtok convert FOLDER RUN` reads the released weights.

hat_released_7b  7.19B parameters, as tfree-hat-pretrained-7b has them
"""

import dataclasses

from jaxtok.configuration import load_config
from jaxtok.lm.hat_released import PUBLISHED, ReleasedModeling
from jaxtok.training.experiment import Experiment


def released() -> Experiment:
    like = load_config("hat_7b")
    published = PUBLISHED["tfree-hat-pretrained-7b"]
    parts = {
        part: dataclasses.replace(getattr(published, part), dtype="bfloat16", remat="full")
        for part in ("encoder", "backbone", "decoder")
    }
    task = ReleasedModeling(model=dataclasses.replace(published, **parts), row_bytes=25088)
    data = dataclasses.replace(
        like.data, corpus="arrayrecord:data/text", length=3584, max_units=100, splitter=task.splitter
    )
    return dataclasses.replace(like, name="hat_released_7b", task=task, data=data)


configs = {"hat_released_7b": released}
