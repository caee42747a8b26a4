"""Classes of images."""

from __future__ import annotations

from jaxtok.protocols import Data, Labelled


def check_classes(known: int, data: Data) -> None:
    """Raises a ValueError if the data have more classes than a model, which has `known` ones."""
    classes = data.classes if isinstance(data, Labelled) else ()
    if len(classes) > known:
        raise ValueError(
            f"task.model.num_classes is {known}; it must be at least {len(classes)}, the number of the data's classes "
            f"({', '.join(classes[:3])}, ...)."
        )
