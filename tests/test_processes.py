"""Threads: `accelerate launch` must not leave all cores but one idle."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = "import torch; from smbert.processes import use_cores; use_cores({}); print(torch.get_num_threads())"


def threads(argument: str, **env: str) -> int:
    launch = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "ACCELERATE_MIXED_PRECISION")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(argument)],
        env={**launch, **env},
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the platform does not tell which cores it may use")
def test_all_cores_under_accelerate_launch() -> None:
    cores = len(os.sched_getaffinity(0))
    assert threads("", OMP_NUM_THREADS="1", ACCELERATE_MIXED_PRECISION="no") == cores
    assert threads("1", OMP_NUM_THREADS="1", ACCELERATE_MIXED_PRECISION="no") == 1


def test_what_the_user_set_stays() -> None:
    assert threads("", OMP_NUM_THREADS="1") == 1
    assert threads("3", OMP_NUM_THREADS="1") == 3
