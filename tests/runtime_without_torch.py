"""The runtime where there is no torch at all: its answers are those that torch gave elsewhere.

    python tests/runtime_without_torch.py make FOLDER     # with torch: exports tiny models, torch's logits beside them
    python tests/runtime_without_torch.py check FOLDER    # with numpy, onnxruntime, tokenizers and `pip install --no-deps .` alone

The second environment is what a service has. Tests block torch inside an interpreter that has it; only here it is really absent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

TOLERANCE = 1e-4  # of logits, in fp32


def make(folder: Path) -> None:
    """Exports a model of single texts or pairs and a regression, and writes what torch answers to each text on its own."""
    import torch
    from run_helpers import WORDS, checkpoint
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from smbert.export import export

    texts = [" ".join(WORDS[i : i + 1 + i % 9]) for i in range(30)]
    for name, labels in (("classes", 3), ("regression", 1)):
        place = checkpoint(folder / name / "checkpoint", layers=2, num_labels=labels)
        export(place, folder / name / "export")
        model, tokenizer = (
            AutoModelForSequenceClassification.from_pretrained(place),
            AutoTokenizer.from_pretrained(place),
        )
        rows = texts if labels > 1 else list(zip(texts, reversed(texts)))
        with torch.inference_mode():
            encoded = (tokenizer(*([r] if isinstance(r, str) else r), return_tensors="pt") for r in rows)
            logits = [model(**inputs).logits[0].tolist() for inputs in encoded]
        (folder / name / "expected.json").write_text(json.dumps({"texts": rows, "logits": logits}))


def check(folder: Path) -> None:
    """Compares, in batches of 1, 7 and 64; AssertionError where an answer differs or torch is there."""
    import numpy as np

    found = [name for name in ("torch", "transformers", "onnx", "datasets") if find_spec(name) is not None]
    assert not found, f"this environment must not have {', '.join(found)}"
    from smbert.runtime import Classifier

    places = sorted(file.parent for file in folder.glob("*/expected.json"))
    assert places, f"{folder} holds nothing to compare with"
    for place in places:
        expected = json.loads((place / "expected.json").read_text())
        for size in (1, 7, 64):
            logits = Classifier(place / "export", batch_size=size).logits(expected["texts"])
            worst = float(np.abs(logits - np.array(expected["logits"])).max())
            assert worst <= TOLERANCE, f"{place.name}: logits differ by {worst:.1e} in batches of {size}"
        print(f"{place.name}: {len(logits)} answers as torch's, the largest difference of a logit {worst:.1e}")
    # The exported folder needs nothing of smbert either.
    alone = [sys.executable, "-B", str(folder / "classes" / "export" / "runtime.py"), "word1 word2"]
    assert "label" in json.loads(subprocess.run(alone, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    {"make": make, "check": check}[sys.argv[1]](Path(sys.argv[2]))
