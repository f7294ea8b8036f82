"""`smbert export`: a checkpoint as a folder that serves it without torch. Hooked into cli.py by `add_parsers`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parsers(commands: Any) -> None:
    """Adds the command to the subparsers of `smbert`."""
    from .cli import add_data_flags

    parser = commands.add_parser(
        "export",
        help="write a checkpoint as a folder for ONNX Runtime or OpenVINO that needs no torch",
        description="With data (--task, or --validation-file) the artefact is measured on the validation rows; --max-drop refuses one that "
        "loses more, and tries safer settings: per channel, the sensitive layers in fp32, static ranges, fp32.",
    )
    parser.add_argument("model", help="folder or Hub id of a fine-tuned checkpoint")
    parser.add_argument("--output", help="folder to write (default: MODEL-ENGINE-PRECISION beside a local model)")
    parser.add_argument(
        "--engine", default="onnx", choices=["onnx", "openvino"], help="onnx is ONNX Runtime (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        default="fp32",
        choices=["fp32", "fp16", "bf16", "int8"],
        help="fp16: onnx only, bf16: openvino only (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        default="dynamic",
        choices=["dynamic", "static"],
        help="int8: ranges of activations per batch, or calibrated",
    )
    parser.add_argument(
        "--per-tensor", action="store_true", help="int8: one scale per weight instead of one per output"
    )
    parser.add_argument("--max-drop", type=float, help="most points of the headline metric that may be lost")
    parser.add_argument("--no-fallback", action="store_true", help="refuse instead of trying safer settings")
    parser.add_argument(
        "--calibration-rows", type=int, default=256, help="training rows for static int8 (default: %(default)s)"
    )
    parser.add_argument("--opset", type=int, default=17, help="of the graph (default: %(default)s)")
    add_data_flags(parser)
    parser.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> None:
    """Exports, and says what came out."""
    from pathlib import Path

    from .export import Gate, export

    output = args.output
    if output is None:
        if not Path(args.model).is_dir():
            raise ValueError("`--output` must be given for a model of the Hub. To resolve, name a folder.")
        output = f"{Path(args.model)}-{args.engine}-{args.precision}"
    gate, calibration = None, []
    if args.task or args.validation_file:
        task, data = _data(args)
        gate = Gate(task, data["validation"], args.max_drop, fallback=not args.no_fallback)
        if args.calibration_rows < 1:
            raise ValueError(
                f"`--calibration-rows` must be at least 1, got {args.calibration_rows}. To resolve, try 256."
            )
        if "train" in data and args.precision == "int8":
            rows = data["train"].shuffle(seed=0)
            rows = rows.select(range(min(args.calibration_rows, len(rows))))
            calibration = Gate(task, rows).texts
    elif args.max_drop is not None:
        raise ValueError("`--max-drop` needs validation rows. To resolve, pass --task, or --validation-file.")
    made = export(
        args.model,
        output,
        engine=args.engine,
        precision=args.precision,
        method=args.method,
        per_channel=not args.per_tensor,
        gate=gate,
        calibration=calibration,
        max_length=args.max_length,
        opset=args.opset,
        tokenizer=args.tokenizer,
        trust_remote_code=args.trust_remote_code,
    )
    for attempt in made.manifest.get("gate", {}).get("attempts", ()):
        verdict = "" if args.max_drop is None else ", passed" if attempt["passed"] else ", refused"
        print(
            f"{attempt['setting']}: {made.manifest['gate']['metric_name']} {attempt['metric']:.4f}, {-attempt['drop_points']:+.2f} points{verdict}"
        )
    print(f"{made.folder}: {made.setting}, {made.size_mb:.1f} MB")
    texts = '"one text" "the other"' if made.manifest["texts_per_row"] == 2 else '"your text"'
    print(f"python {made.folder / 'runtime.py'} {texts}")


def _data(args: argparse.Namespace) -> tuple[Any, Any]:
    """The task and its data; the classes of one's own files are numbered as the model numbers them."""
    from .checkpoints import load_model
    from .cli import data_of
    from .heads import in_order_of, label_names

    model = load_model(args.model, trust_remote_code=args.trust_remote_code)
    if args.validation_file and args.label_names is None:
        args.label_names = label_names(model)
    return in_order_of(model, *data_of(args, ("validation",)))
