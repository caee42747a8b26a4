"""The released HAT of 7B from scratch: rows of 3,584 words, with room for seven bytes a word.

    jaxtok train configs/lm/hat_released_7b.py --data.corpus arrayrecord:/path/to/records

Its authors trained on about 4T words (70 % English, 7 % German, code and mathematics), at a context of 3,500 words; the
data, the batch and the optimizer are not public, so those are the paper's of the variant at 7B.
"""

import dataclasses

from jaxtok.lm.hat_released import PUBLISHED, ReleasedModeling
from jaxtok.training.recipes import hat

like = hat("7b", corpus="arrayrecord:data/text", fsdp=128)
published = PUBLISHED["tfree-hat-pretrained-7b"]
parts = {
    part: dataclasses.replace(getattr(published, part), dtype="bfloat16", remat="full")
    for part in ("encoder", "backbone", "decoder")
}
task = ReleasedModeling(model=dataclasses.replace(published, **parts), row_bytes=25088)
config = dataclasses.replace(
    like,
    name="hat_released_7b",
    task=task,
    data=dataclasses.replace(like.data, length=3584, max_units=100, splitter=task.splitter),
)
