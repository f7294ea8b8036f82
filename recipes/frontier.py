"""The frontier recipe: one run, a family of models, each the most accurate that we can make for its speed on this machine.

    accelerate launch recipes/frontier.py --model DIR --task mrpc --data-dir DIR --speedups 2,4,6
    accelerate launch recipes/frontier.py --model google-bert/bert-base-uncased --task mrpc --speedups 2,4,6        # from the Hub
    accelerate launch recipes/frontier.py --model DIR --train-file a.csv --validation-file b.csv --speedups 2,4,6   # your own task
    accelerate launch recipes/frontier.py --model DIR --task mrpc --data-dir DIR                                    # one model, 2x

WHY these steps, in this order:
 1. Teacher. The checkpoint is fine-tuned on the task, unless it is already. It teaches every member of the family: what a member
    has lost cannot be learned from that member.
 2. Pruning to a speed-up. For every attention and feed-forward block the weights are found that imitate it best with fewer heads or
    neurons (optimal brain surgery), for all sizes at once. A table of measured milliseconds, and what each block's loss does to the
    answers, then choose the sizes, and again where the model as a whole is slower or faster than the table says. So depth and width
    fall out of one search, for this machine; no labels are needed.
 3. Recovery. The pruned model starts near its teacher, so a short training on the teacher's logits and hidden states repairs it. The
    nearer it is, the lower the learning rate: what has lost next to nothing has only that to lose. Faster members train longer.
 4. Again from 2, from the recovered model, to the next speed-up. Small steps with a recovery each end better than one leap, and every
    step is a model that somebody can use. The budget remains a share of the original's time.
 5. The report: every member beside the teacher, timed in turns in one process, and whether the speed-up asked for was measured.

Kill it at any time; the same command goes on where it stopped. All numbers stand in frontier.yaml; set any with
`--set distill.epochs=5`, `--set retraining_free.shape=1x128` or `--set retraining_free.samples=512`.
"""

from __future__ import annotations

import sys
from pathlib import Path

# The folder of this script also holds a smbert.py, which must not hide the package.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

from smbert.cli import recipe_main  # noqa: E402

if __name__ == "__main__":
    sys.exit(recipe_main(default_recipe="frontier", description=__doc__))
