"""Batches from several of Grain's iterators."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from jaxtok.protocols import Batch


class StreamBatches:
    """An iterator of batches, joined from streams. Its state is a JSON value: {stream: state}."""

    def __init__(self, streams: dict[int, grain.DatasetIterator[Batch]]):
        self._streams = streams

    def __iter__(self) -> StreamBatches:
        return self

    def __next__(self) -> Batch:
        parts = [next(stream) for stream in self._streams.values()]
        if len(parts) == 1:
            return parts[0]
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def get_state(self) -> dict[str, Any]:
        return {str(number): stream.get_state() for number, stream in self._streams.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves to where an iterator with this state was; that iterator may have had more streams."""
        for number, stream in self._streams.items():
            stream.set_state(state[str(number)])

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
