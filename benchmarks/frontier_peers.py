"""What frontier.py exchanges with the scripts below peers/: rows and folders in, weights and a peer.json out."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from smbert.context import Context
from smbert.surgery import PruningPlan, keep_units
from smbert.target import Sizes
from smbert.teacher import freeze, join_unlabelled

PEERS = Path(__file__).with_name("peers")
TEXTPRUNER_FAMILIES = ("bert", "roberta", "xlm-roberta", "electra")
INSTALL = {
    "textbrewer": 'pip install "textbrewer==0.2.1.post1" tensorboard',
    "textpruner": "make the environment that benchmarks/peers/textpruner.py describes, and name its interpreter with --peer-python",
}


def absent(name: str, python: str | None) -> str | None:
    """Why a peer cannot run: its package is not there; None where it is."""
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is None)"
    try:
        there = python is not None and subprocess.run([python, "-c", look], capture_output=True).returncode == 0
    except OSError:
        there = False
    return None if there else f"{name} is not installed. To resolve, {INSTALL[name]}."


def run_peer(name: str, python: str | None, out: Path, *arguments: Any) -> dict[str, Any]:
    """Runs a script of peers/ unless its result is there; returns its peer.json, which it writes last.

    Raises:
        ValueError: it failed, and its last words are in the message; or it must run, and no interpreter was named.
    """
    file = out / "peer.json"
    if not file.is_file():
        if python is None:
            raise ValueError(absent(name, python))
        command = [python, str(PEERS / f"{name}.py"), *map(str, arguments), "--output", str(out)]
        environ = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        done = subprocess.run(command, capture_output=True, text=True, env=environ)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"{name} failed: {last} To resolve, run it alone: {' '.join(command)}")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def rows_file(context: Context, split: str, folder: Path, pool: bool = False) -> Path:
    """The split's token ids and labels as JSON lines, which every library can read; written once. The pool's have no label's value."""
    file = folder / f"{split}{'-and-pool' if pool else ''}.jsonl"
    if not file.is_file():
        rows = join_unlabelled(getattr(context.data, split), context.pool if pool else None, context.data.task)
        columns = [c for c in rows.column_names if c == "labels" or c in context.tokenizer.model_input_names]
        part = file.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in rows.select_columns(columns)), encoding="utf-8")
        part.replace(file)
    return file


def with_weights(
    folder: Path, teacher: PreTrainedModel, sizes: Sizes, context: Context, logits: Sequence[Sequence[float]]
) -> PreTrainedModel:
    """The weights that TextPruner has left of the teacher, in smbert's class of that shape.

    Raises:
        ValueError: the model does not answer as it did in TextPruner's process, where `logits` are those of the first validation rows.
    """
    layers, names = sizes.layers, context.tokenizer.model_input_names
    plan = PruningPlan(heads=(tuple(range(sizes.heads)),) * layers, ffn=(tuple(range(sizes.ffn)),) * layers)
    model = keep_units(teacher, plan).cpu().eval()
    model.load_state_dict(load_file(folder / "weights.safetensors"))
    rows = context.data.validation.select(range(len(logits)))
    batch = {key: value for key, value in context.collator(list(rows)).items() if key in names}
    with torch.inference_mode():
        difference = (freeze(copy.deepcopy(model))(**batch).logits - torch.tensor(logits)).abs().max().item()
    if not difference <= 1e-3:
        raise ValueError(
            f"the weights in {folder} answer differently here (logits differ by {difference:.1e}). To resolve, delete that folder, "
            "and install the versions that benchmarks/peers/textpruner.py names."
        )
    return model
