"""compress() on your own checkpoint and your own CSV.

python recipes/custom_checkpoint.py MODEL train.csv validation.csv [OUTPUT_DIR]
"""

from __future__ import annotations

import sys
from pathlib import Path

# The folder of this script also holds a smbert.py, which must not hide the package.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from datasets import load_dataset  # noqa: E402

import smbert  # noqa: E402


def main(model: str, train_file: str, validation_file: str, output_dir: str = "smbert-output") -> None:
    data = load_dataset("csv", data_files={"train": train_file, "validation": validation_file})
    result = smbert.compress(
        model,  # a folder or a Hub id; fine-tuned on these labels already, or raw
        train_dataset=data["train"],  # text columns and the label column are found; or name them
        eval_dataset=data["validation"],
        target={"speedup": 6},  # measured on this machine; or {"params": "35%"}, {"latency_ms": 12}
        output_dir=output_dir,  # run the same command again to go on after an interruption
    )
    print(result.report.markdown())
    print(f"target met: {result.target_met}; the model is in {result.model_dir}")


if __name__ == "__main__":
    if len(sys.argv) not in (4, 5):
        sys.exit(__doc__)
    main(*sys.argv[1:])
