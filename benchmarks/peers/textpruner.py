"""TextPruner, in an environment of its own, for benchmarks/frontier.py.

    python3.11 -m venv textpruner-env
    textpruner-env/bin/pip install "transformers==4.40.2" "torch<2.14" safetensors "numpy<2"
    textpruner-env/bin/pip install --no-deps "textpruner==1.1.post2"   # it asks for a numpy without wheels for this Python
    textpruner-env/bin/python benchmarks/peers/textpruner.py --teacher DIR --heads 8 --ffn 1024 --train rows.jsonl --validation rows.jsonl --output DIR

WHY an environment: it prunes heads through `prune_heads`, which transformers 5 has removed. WHY a state dict: the configuration that it
saves is read by no transformers 5, but the weights have the names and the sizes of smbert's slim classes. So nothing of smbert is
imported here, and rows come as token ids, since an old library cannot read a new tokenizer's files.

Settings are the authors' (examples/transformer_pruning): iterative pruning in 4 steps by the loss on gold labels, heads and FFN
together, the same number in every layer. It prunes and does not train; frontier.py gives the result the same recovery on labels as
plain fine-tuning. Families: BERT, RoBERTa, XLM-RoBERTa, ELECTRA.

Paper: Yang et al. (2022), TextPruner. Licence: Apache-2.0.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# The folder of this script also holds this very file, whose name would hide the package.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

import textpruner  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForSequenceClassification  # noqa: E402

# So many rows of the validation split tell, by their logits, whether another library has read the weights as they are meant.
PROBE_ROWS = 32


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="fine-tuned folder")
    parser.add_argument("--heads", type=int, required=True, help="that stay in each layer")
    parser.add_argument("--ffn", type=int, required=True, help="neurons that stay in each layer")
    parser.add_argument("--train", required=True, help="JSON lines: input_ids, attention_mask, labels of each row")
    parser.add_argument("--validation", required=True, help="likewise")
    parser.add_argument("--output", required=True, help="folder for weights.safetensors and peer.json")
    parser.add_argument("--iterations", type=int, default=4, help="(default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    args = parser.parse_args(argv)

    random.seed(args.seed)
    torch.manual_seed(args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(args.teacher)
    padding = model.config.pad_token_id or 0
    rows = rows_of(Path(args.train))
    random.shuffle(rows)
    loader = list(batches(rows, args.batch_size, padding))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # for the importances, which it pickles
        pruner = textpruner.TransformerPruner(
            model,
            transformer_pruning_config=textpruner.TransformerPruningConfig(
                target_ffn_size=args.ffn, target_num_of_heads=args.heads, pruning_method="iterative", n_iters=args.iterations,
                ffn_even_masking=True, head_even_masking=True, use_logits=False,
            ),
            general_config=textpruner.GeneralConfig(output_dir=folder),
        )  # fmt: skip
        pruner.prune(dataloader=loader, save_model=False)
    seconds = time.perf_counter() - start
    held_out = rows_of(Path(args.validation))
    logits = answers(model.cpu().eval(), batches(held_out, args.batch_size, padding))
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, str(out / "weights.safetensors"), metadata={"format": "pt"})
    record: dict[str, Any] = {
        "peer": f"textpruner {textpruner.__version__}",
        "heads": args.heads,
        "ffn": args.ffn,
        "seconds": seconds,
        "metrics": metrics(logits, held_out),
        "logits": logits[:PROBE_ROWS].tolist(),
    }
    (out / "peer.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def batches(rows: Sequence[dict[str, Any]], size: int, padding: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches (batch, longest row) in the order of the rows."""
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        longest = max(len(row["input_ids"]) for row in part)
        batch = {}
        for key in part[0]:
            if key == "labels":
                batch[key] = torch.tensor([row[key] for row in part])
            else:
                fill = padding if key == "input_ids" else 0
                batch[key] = torch.tensor([row[key] + [fill] * (longest - len(row[key])) for row in part])
        yield batch


@torch.no_grad()
def answers(model: Any, loader: Iterator[dict[str, torch.Tensor]]) -> torch.Tensor:
    """Logits (rows, classes)."""
    return torch.cat([model(**{k: v for k, v in batch.items() if k != "labels"}).logits for batch in loader])


def metrics(logits: torch.Tensor, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Straight after pruning, before any recovery: accuracy, or the mean squared error of a regression."""
    gold = torch.tensor([row["labels"] for row in rows])
    if logits.shape[1] == 1:
        return {"mse": (logits[:, 0] - gold).square().mean().item()}
    return {"accuracy": (logits.argmax(1) == gold).float().mean().item()}


if __name__ == "__main__":
    sys.exit(main())
