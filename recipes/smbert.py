"""The SmBERT recipe from a checkpoint to a small model and an honest report.

    accelerate launch recipes/smbert.py --demo                                                      # no Hub needed
    accelerate launch recipes/smbert.py --model google-bert/bert-base-uncased --task mrpc           # from the Hub
    accelerate launch recipes/smbert.py --model DIR --task mrpc --data-dir DIR                       # from folders
    accelerate launch recipes/smbert.py --model DIR --train-file a.csv --validation-file b.csv --text-columns text --label-column label

WHY these steps, in this order:
 1. Teacher. The checkpoint is fine-tuned on the task, unless it is already. Everything after it learns from it.
 2. Depth, twice (12 -> 6 -> 3). Layers cost latency at every batch size, so they go first; going by halves keeps each successor
    layer's job small: it learns to stand in for two layers while its neighbours are still the teacher's.
 3. Distillation from the original teacher: logits, hidden states and attention repair what two replacements lost. It comes before
    the width is cut, because the attention objective compares head by head.
 4. Width (2/3 of heads and FFN neurons). Importance is read off a trained student, so it comes after 3.
 5. Recovery: the pruned student learns from the teacher's logits and the labels once more.

With `--intermediate mnli`, steps 2 to 4 take place on that task, with a teacher of its own, and step 5 is what adapts the result
to the target task: the paper's way for small data sets. All numbers stand in smbert.yaml; set any with `--set distill.epochs=5`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Python puts a script's own folder first on the path, where this file's name would hide the package of the same name.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from smbert.cli import recipe_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(recipe_main(default_recipe="smbert", description=__doc__))
