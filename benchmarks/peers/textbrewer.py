"""TextBrewer's GeneralDistiller, in a process of its own, for benchmarks/frontier.py.

    pip install "textbrewer==0.2.1.post1" tensorboard        # beside smbert: it trains on transformers 5
    python benchmarks/peers/textbrewer.py --teacher DIR --student DIR --train rows.jsonl --steps 300 --output DIR

WHY a process: the peer keeps its own random state, checkpoints and imports, and smbert only measures the folder that it leaves.

Settings are the authors'. From their GLUE script (examples/mnli_example): temperature 8, cross-entropy, no gold labels, learning rate
1e-4, hidden states matched at even distances by mean squared error and by MMD, weight 1 each. Their script has an optimiser and a
schedule of its own for an old library; AdamW with 10 % linear warm-up and batches of 32 are those of their SST-2 notebook.

Paper: Yang et al. (2020), TextBrewer. Licence: Apache-2.0.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The folder of this script also holds this very file, whose name would hide the package.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import textbrewer  # noqa: E402
import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402
from transformers import PreTrainedModel, get_linear_schedule_with_warmup  # noqa: E402

from smbert.checkpoints import load_model, save_model  # noqa: E402
from smbert.surgery import structure_of  # noqa: E402


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="fine-tuned folder")
    parser.add_argument("--student", required=True, help="folder of the shape that learns, with its first weights")
    parser.add_argument("--train", required=True, help="JSON lines: input_ids, attention_mask, ... of each row")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--output", required=True, help="folder for the student and peer.json")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="(default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=8.0, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    teacher, student = load_model(args.teacher), load_model(args.student)
    loader = DataLoader(
        rows_of(Path(args.train)), args.batch_size, shuffle=True, drop_last=False, collate_fn=padded_to(teacher)
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # it writes a pickle of the weights, which nobody needs
        distiller = textbrewer.GeneralDistiller(
            textbrewer.TrainingConfig(ckpt_steps=args.steps, output_dir=folder, device=device),
            textbrewer.DistillationConfig(
                temperature=args.temperature, kd_loss_type="ce", hard_label_weight=0, intermediate_matches=matches(teacher, student)
            ),
            teacher.to(device), student.to(device), adaptor, adaptor,
        )  # fmt: skip
        with distiller:
            distiller.train(
                torch.optim.AdamW(student.parameters(), lr=args.learning_rate),
                loader,
                num_steps=args.steps,
                scheduler_class=get_linear_schedule_with_warmup,
                scheduler_args={"num_warmup_steps": int(0.1 * args.steps), "num_training_steps": args.steps},
                output_hidden_states=True,
            )
    save_model(student.cpu().eval(), args.output)
    record = {
        "peer": f"textbrewer {textbrewer.__version__}",
        "steps": args.steps,
        "seconds": time.perf_counter() - start,
    }
    (Path(args.output) / "peer.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def matches(teacher: PreTrainedModel, student: PreTrainedModel) -> list[dict[str, Any]]:
    """Embeddings and every student layer against teacher layers at even distances (12 to 3: 0, 4, 8, 12), as their matches.py."""
    deep, shallow = structure_of(teacher).num_layers, structure_of(student).num_layers
    found: list[dict[str, Any]] = []
    for own in range(shallow + 1):
        other = round(own * deep / shallow)
        found.append({"layer_T": other, "layer_S": own, "feature": "hidden", "loss": "hidden_mse", "weight": 1})
        found.append({"layer_T": [other] * 2, "layer_S": [own] * 2, "feature": "hidden", "loss": "mmd", "weight": 1})
    return found


def adaptor(batch: dict[str, torch.Tensor], outputs: Any) -> dict[str, Any]:
    """What a GeneralDistiller compares: logits, and the hidden states of tokens that are no padding."""
    return {"logits": outputs.logits, "hidden": outputs.hidden_states, "inputs_mask": batch["attention_mask"]}


def rows_of(file: Path) -> list[dict[str, list[int]]]:
    """The rows without their labels: these settings make no use of them."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key != "labels"} for row in rows]


def padded_to(model: PreTrainedModel) -> Any:
    """Joins rows into a batch (batch, longest row)."""
    padding: Any = model.config.pad_token_id or 0

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row["input_ids"]) for row in rows)
        fill = {key: padding if key == "input_ids" else 0 for key in rows[0]}
        return {
            key: torch.tensor([row[key] + [value] * (longest - len(row[key])) for row in rows])
            for key, value in fill.items()
        }

    return collate


if __name__ == "__main__":
    sys.exit(main())
