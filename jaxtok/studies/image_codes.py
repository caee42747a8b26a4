"""How many of their codes image tokenizers use."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jaxtok.data.images import ImageData
from jaxtok.protocols import Params


@dataclasses.dataclass(frozen=True)
class CodeUsage:
    """Measures the codes of all images of a split: how many occur, their perplexity, and the divergence of their shares
    from the uniform distribution in nats."""

    split: str = "all"

    def __call__(self, task: Any, params: Params, data: ImageData) -> dict[str, float]:
        data = dataclasses.replace(data, eval_limit=0)
        numbers = task.evaluate(params, data.eval_batches(self.split))
        if "codes_used" not in numbers:
            return {}
        codes = math.prod(task.code_values)
        return {
            "codes_used_of_all": numbers["codes_used"],
            "share_used": numbers["codes_used"] / codes,
            "perplexity_of_all": numbers["perplexity"],
            "nats_below_uniform": math.log(codes / numbers["perplexity"]),
        }
