"""Which of the processes of an `accelerate launch` this is."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """The state that all parts of smbert share; the first call decides on the back end.

    Accelerator and TrainingArguments obey ACCELERATE_USE_CPU by themselves; a bare PartialState does not, and then every process
    of a CPU launch takes itself for the main one. The others wait for the main process while it asks the teacher, saves and measures,
    which may take longer than the ten minutes or half an hour that torch allows.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7))


def use_cores(threads: int | None = None) -> None:
    """Give torch its CPU threads: as many as asked for, else all cores where `accelerate launch` has left it one.

    Where nothing is set, `accelerate launch` sets OMP_NUM_THREADS=1, also for a single process: one core would work.

    Raises:
        ValueError: fewer than one thread.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if threads is None and launched and process_state().num_processes == 1:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if threads is not None and threads < 1:
        raise ValueError(f"`threads` must be at least 1, got {threads}. To resolve, correct it, or leave it out.")
    if threads is not None:
        torch.set_num_threads(threads)
