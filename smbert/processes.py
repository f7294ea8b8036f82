"""Which of the processes of an `accelerate launch` this is."""

from __future__ import annotations

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env


def process_state() -> PartialState:
    """The state that all parts of smbert share; the first call decides on the back end.

    Accelerator and TrainingArguments obey ACCELERATE_USE_CPU by themselves; a bare PartialState does not, and then every process
    of a CPU launch takes itself for the main one.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
