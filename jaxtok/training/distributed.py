"""Several processes as one run: how they find each other, and how they agree.

`initialize` must be called before anything else uses JAX. A run of one process needs none of this; there, the functions
that make processes agree do nothing.
"""

from __future__ import annotations

import json
import os
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def initialize(
    coordinator: str = "", num_processes: int | None = None, process_id: int | None = None, detect: bool = False
) -> bool:
    """Joins the other processes of a run, if there are any; returns whether there are.

    It looks at the arguments; then at JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID; then at what Slurm
    (`srun`) and TPU pods set. With `detect`, it asks a TPU VM that sets no variables.

    Raises:
      ValueError: there is a coordinator, but not the number of processes or this process's own number.
    """
    env = os.environ
    coordinator = coordinator or env.get("JAX_COORDINATOR_ADDRESS", "")
    slurm = int(env.get("SLURM_STEP_NUM_TASKS", 1))
    if num_processes is None:
        num_processes = int(env.get("JAX_NUM_PROCESSES", 0)) or (slurm if slurm > 1 else None)
    if process_id is None and (own := env.get("JAX_PROCESS_ID", env.get("SLURM_PROCID" if slurm > 1 else "", ""))):
        process_id = int(own)
    if coordinator:
        if not num_processes or process_id is None:
            raise ValueError(
                f"the coordinator is {coordinator}, but the number of processes or the number of this one is missing; "
                "give --num-processes and --process-id (or set JAX_NUM_PROCESSES and JAX_PROCESS_ID)."
            )
        if not 0 <= process_id < num_processes:
            raise ValueError(f"process-id is {process_id}; it must be 0 to {num_processes - 1} (num-processes - 1).")
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif detect or slurm > 1 or "," in env.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in env:
        jax.distributed.initialize()
    else:
        return False
    return True


def is_main() -> bool:
    """Whether this is the process that writes the logs and the terminal."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits until all processes have come to this call."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, which JSON must be able to hold, to every process."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(text)]))
    padded = np.zeros(int(sizes.max()), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(row[: int(n)].tobytes()) for row, n in zip(rows, sizes.ravel())]
