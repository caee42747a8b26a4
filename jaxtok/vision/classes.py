"""Classes of images."""

from __future__ import annotations

from jaxtok.protocols import Data, Labelled


def check_classes(known: int, data: Data) -> None:
    """Raises a ValueError where the data have more classes than the `known` ones of a model."""
    classes = data.classes if isinstance(data, Labelled) else ()
    if len(classes) > known:
        raise ValueError(
            f"task.model.num_classes is {known}, but the data have {len(classes)} classes ({', '.join(classes[:3])}, "
            "...); raise it."
        )
