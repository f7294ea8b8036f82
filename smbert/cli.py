"""The command line: `smbert COMMAND`, and the flags that `recipes/smbert.py` shares with `smbert compress`.

Thin over the library: flags become arguments of a library call. What the user can resolve is one line and exit status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from ._cli_export import add_parsers as add_export_parsers
from ._cli_students import add_parsers as add_student_parsers
from ._recipe_help import recipe_help
from .processes import process_state, use_cores
from .trainer import TrainingDiverged


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the `smbert` command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="smbert", description="Compress BERT-family encoders and report honestly what it costs."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_compress_flags(
        commands.add_parser(
            "compress",
            help="compress a checkpoint",
            epilog=recipe_help(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ),
        default_recipe="smbert",
    )
    evaluate = commands.add_parser("evaluate", help="score a checkpoint on a task's validation split")
    evaluate.add_argument("model", help="folder or Hub id")
    add_data_flags(evaluate)
    evaluate.set_defaults(run=run_evaluate)
    bench = commands.add_parser("bench", help="time checkpoints against a baseline, in turns, in one process")
    bench.add_argument("models", nargs="+", help="folders or Hub ids; the first is the baseline")
    bench.add_argument(
        "--shapes", default="1x128,32x128", help="batch x length, comma separated (default: %(default)s)"
    )
    bench.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    bench.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="bfloat16 is autocast")
    bench.add_argument("--disable-tqdm", action="store_true", help="no progress bars")
    bench.set_defaults(run=run_bench)
    look = commands.add_parser("inspect", help="draw a checkpoint's structure")
    look.add_argument("model", help="folder or Hub id")
    look.set_defaults(run=run_inspect)
    add_export_parsers(commands)
    add_student_parsers(commands)
    args = parser.parse_args(argv)
    return guarded(args.run, args)


def recipe_main(default_recipe: str, argv: Sequence[str] | None = None, description: str | None = None) -> int:
    """Entry point of a script below recipes/."""
    parser = argparse.ArgumentParser(
        description=description, epilog=recipe_help(), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_compress_flags(parser, default_recipe)
    args = parser.parse_args(argv)
    return guarded(args.run, args)


def guarded(run: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command; what the user can resolve is one clear message and status 2."""
    import transformers

    # Their bars for files of a few megabytes would drown ours for the training.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        main_process = process_state().is_main_process
        use_cores(getattr(args, "threads", None))
        logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(message)s")
        logging.getLogger("httpx").setLevel(logging.WARNING)
        run(args)
    except (ValueError, TypeError, TrainingDiverged, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        # With --restart the same command would throw away what is there.
        print(f"\ninterrupted. To go on where it stopped: {command_line().replace(' --restart', '')}", file=sys.stderr)
        return 130
    return 0


def one_line(error: BaseException) -> str:
    """The message without the line breaks of other libraries; the faults of a recipe keep a line each."""
    text = str(error) or type(error).__name__
    return text if "\n  - " in text else " ".join(text.split())


def command_line() -> str:
    """The command as it was typed, as far as a process can know."""
    program = sys.argv[0].rpartition("/")[2] if not sys.argv[0].endswith(".py") else f"accelerate launch {sys.argv[0]}"
    return shlex.join(program.split() + sys.argv[1:])


# ------------------------------------------------------------------------------------------------------------------ flags


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Where texts and labels come from."""
    group = parser.add_argument_group("data")
    group.add_argument("--task", help="GLUE task, from the Hub or --data-dir")
    group.add_argument(
        "--data-dir", help="folder with TASK/train.parquet, validation.parquet (or csv, json), or the task's own folder"
    )
    group.add_argument("--train-file", help="own data: csv, json, jsonl or parquet")
    group.add_argument("--validation-file", help="own data, held out")
    group.add_argument("--text-columns", nargs="+", help="one column, or two for pairs (default: found)")
    group.add_argument("--label-column", help="(default: label or labels)")
    group.add_argument("--label-names", nargs="+", help="the classes in the order of their numbers (default: sorted)")
    group.add_argument(
        "--kind", choices=["single_label", "multi_label", "regression"], help="(default: read off the labels)"
    )
    group.add_argument("--tokenizer", help="folder or Hub id (default: the model's)")
    group.add_argument("--max-length", type=int, help="most tokens per row (default: the recipe's, 128)")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code that comes with the checkpoint"
    )


def add_compress_flags(parser: argparse.ArgumentParser, default_recipe: str) -> None:
    """Everything that `smbert.compress` takes."""
    parser.add_argument("--model", help="folder or Hub id of a fine-tuned or raw encoder")
    parser.add_argument(
        "--demo", action="store_true", help="compress the demo checkpoint on the demo data (needs no Hub)"
    )
    add_data_flags(parser)
    group = parser.add_argument_group("recipe")
    group.add_argument("--recipe", default=default_recipe, help="name or YAML file (default: %(default)s)")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="set a recipe key: teacher.epochs=1, distill.epochs=5 (all of a kind), stages.4.heads=6 (one stage)",
    )  # fmt: skip
    group.add_argument("--intermediate", help="GLUE task on which the chain runs first, such as mnli")
    group.add_argument("--teacher", help="fine-tuned checkpoint to learn from (default: the model, fine-tuned)")
    group.add_argument("--unlabelled-file", help="texts without labels, soft-labelled by the teacher")
    group.add_argument(
        "--turned-pairs",
        action="store_true",
        help="the training pairs turned round, (b, a), are texts without labels, too",
    )
    group.add_argument(
        "--target",
        metavar="GOAL=VALUE",
        help="speedup=6, params=35%% or latency_ms=12: sets the sizes by measuring here",
    )
    group.add_argument(
        "--target-shape", default="32x128", help="batch x length at which the target is measured (default: %(default)s)"
    )
    group.add_argument(
        "--speedups",
        help="2,3,4,6: a family of models in one run, each pruned from the one before (small steps can keep more), by the frontier "
        "recipe unless another prunes to a speed-up",
    )
    group.add_argument("--new-head", action="store_true", help="replace a head that was trained on other labels")
    group = parser.add_argument_group("run")
    group.add_argument("--output-dir", help="(default: smbert-output, smbert-demo for the demo)")
    group.add_argument("--seed", type=int, default=42, help="(default: %(default)s)")
    group.add_argument("--restart", action="store_true", help="start over instead of going on")
    group.add_argument(
        "--no-baseline", action="store_true", help="leave out the model of the same shape without distillation"
    )
    group.add_argument("--no-int8-teacher", action="store_true", help="leave out the row of the teacher in int8")
    group.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="a TrainingArguments field, such as bf16=false"
    )
    group.add_argument("--threads", type=int, help="CPU threads (default: all cores, over all processes)")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bars")
    parser.set_defaults(run=run_compress)


def pairs(items: Sequence[str], flag: str) -> dict[str, Any]:
    """KEY=VALUE flags, values read as YAML."""
    out = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise ValueError(f"`{flag}` must look like KEY=VALUE, got {item!r}. To resolve, correct it.")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ValueError(f"`{flag} {item}` has a value that is not YAML. To resolve, correct it.") from None
        # YAML reads 1e-5 as text and 2/3 stays text, which is how shares are written.
        if isinstance(parsed, str):
            with contextlib.suppress(ValueError):
                parsed = float(parsed)
        out[key] = parsed
    return out


# --------------------------------------------------------------------------------------------------------------- commands


def data_of(args: argparse.Namespace, required: Sequence[str] = ("train", "validation")) -> tuple[Any, Any]:
    """The task and its data from the data flags."""
    from .tasks import load_files, load_task

    if args.train_file or args.validation_file:
        return load_files(
            args.train_file,
            args.validation_file,
            required=required,
            text_columns=args.text_columns,
            label_column=args.label_column,
            label_names=args.label_names,
            kind=args.kind,
        )
    if args.task is None:
        raise ValueError(
            "`--task`, or `--train-file` and `--validation-file`, must be given. To resolve, pass one of the two."
        )
    return load_task(args.task, args.data_dir, required)


def run_compress(args: argparse.Namespace) -> None:
    from datasets import DatasetDict

    from ._rows import read_files
    from .compress import compress
    from .family import compress_family
    from .inputs import as_recipe, with_turned_pairs

    if args.speedups and args.target:
        raise ValueError(
            "`--speedups` and `--target` must not be given together. To resolve, put the target among the speed-ups."
        )
    if args.speedups and args.recipe == "smbert":
        args.recipe = "frontier"
    recipe, model, output_dir = as_recipe(args.recipe), args.model, args.output_dir
    if args.demo:
        from .demo import demo_checkpoint, demo_task

        if args.recipe == "smbert":
            recipe = as_recipe("demo")
        model = model or str(demo_checkpoint())
        task, data = demo_task()
        output_dir = output_dir or "smbert-demo"
    else:
        if model is None:
            raise ValueError("`--model` must be given. To resolve, pass a folder or a Hub id, or try --demo.")
        task, data = data_of(args)
    changes = pairs(args.changes, "--set")
    if args.max_length is not None:
        changes["max_length"] = args.max_length
    recipe = recipe.override(changes) if changes else recipe
    intermediate: Mapping[str, DatasetDict] | Sequence[str] = ()
    if args.intermediate:
        recipe, intermediate = recipe.through(args.intermediate), [args.intermediate]
    unlabelled = read_files([args.unlabelled_file]) if args.unlabelled_file else None
    if args.turned_pairs:
        unlabelled = with_turned_pairs(unlabelled, data["train"], task)
    goal = pairs([args.target], "--target") | {"shape": args.target_shape} if args.target else None
    options: dict[str, Any] = {
        "task": task,
        "data_dir": args.data_dir,
        "train_dataset": data["train"],
        "eval_dataset": data["validation"],
        "unlabelled_dataset": unlabelled,
        "intermediate": intermediate,
        "teacher": args.teacher,
        "tokenizer": args.tokenizer,
        "args": {**pairs(args.arg, "--arg"), **({"disable_tqdm": True} if args.disable_tqdm else {})},
        "seed": args.seed,
        "resume": not args.restart,
        "new_head": args.new_head,
        "int8_teacher": not args.no_int8_teacher,
        "trust_remote_code": args.trust_remote_code,
        "command": command_line(),
    }
    if args.speedups:
        family = compress_family(
            model, numbers(args.speedups, "--speedups"), recipe, output_dir=output_dir or "smbert-family", **options
        )
        if process_state().is_main_process:
            show_family(family, output_dir or "smbert-family")
        return
    result = compress(
        model,
        recipe,
        target=goal,
        output_dir=output_dir or "smbert-output",
        baseline=not args.no_baseline,
        **options,
    )
    if process_state().is_main_process:
        show_result(result)


def numbers(text: str, flag: str) -> list[float]:
    """Comma-separated numbers."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"`{flag}` must look like 2,4,6, got {text!r}. To resolve, correct it.") from None


def show_family(family: Any, output_dir: str) -> None:
    """The table of all members, what became of each target, and where they lie."""
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(family.report.table())
    for note in family.report.notes:
        print(note)
    print(f"report  {output_dir}/report.md\nplot    {output_dir}/report.png\nmodels  {output_dir}/*/model")


def show_result(result: Any) -> None:
    """The table, where everything lies, and how to load the model."""
    # Where the output is no terminal rich assumes 80 columns, which would break the table's words.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(result.report.table())
    for note in result.report.notes:
        console.print(note, highlight=False, markup=False)
    if (target := result.report.target) is not None:
        measured = f"{target['measured']:,.0f}" if target["goal"] == "params" else target["measured"]
        console.print(
            f"target {target['goal']} {target['asked']}: measured {measured}, {'met' if target['met'] else 'NOT met'}"
        )
    out = result.output_dir
    console.print(
        f"\nreport  {out / 'report.md'}\nplot    {out / 'report.png'}\nmodel   {result.model_dir}\n", highlight=False
    )
    console.print(
        f'import smbert\nfrom transformers import pipeline\nprint(pipeline("text-classification", "{result.model_dir}")("your text"))',
        highlight=False, markup=False,
    )  # fmt: skip


def run_evaluate(args: argparse.Namespace) -> None:
    from .checkpoints import load_model
    from .context import Context
    from .heads import check_labels, in_order_of, is_finetuned, label_names
    from .inputs import as_tokenizer, tokenised

    model = load_model(args.model, trust_remote_code=args.trust_remote_code)
    if not is_finetuned(args.model):
        raise ValueError(f"{args.model} has no trained classification head. To resolve, fine-tune it, or compress it.")
    if args.validation_file and args.label_names is None:
        args.label_names = label_names(model)
    task, data = data_of(args, ("validation",))
    task, data = in_order_of(model, task, data)
    check_labels(model, task)
    tokenizer = as_tokenizer(args.model, args.tokenizer, args.trust_remote_code)
    for split in task.validation_splits:
        if split not in data:
            continue
        rows = {"train": data[split], "validation": data[split]}
        context = Context(tokenizer, tokenised(task, rows, tokenizer, args.max_length or 128), cache_dir=None)  # type: ignore[arg-type]
        for name, value in context.evaluate(model).items():
            print(f"{task.name} {split} {name} {value:.4f}")


def run_bench(args: argparse.Namespace) -> None:
    import torch

    from .checkpoints import load_model
    from .context import on_device
    from .measure import count_parameters, environment, latency, machine_line, speedups

    try:
        shapes = [(int(batch), int(seq)) for batch, seq in (s.split("x") for s in args.shapes.split(","))]
    except ValueError:
        raise ValueError(
            f"`--shapes` must look like 1x128,32x128, got {args.shapes!r}. To resolve, correct it."
        ) from None
    models = {place: on_device(load_model(place)) for place in args.models}
    dtype = getattr(torch, args.dtype)
    timed = latency(models, shapes, dtype=dtype, threads=args.threads, disable_tqdm=args.disable_tqdm)
    faster = speedups(timed, args.models[0])
    table = Table(
        "model",
        "parameters",
        *(f"{s} p50 / p95 ms" for s in timed[args.models[0]]),
        *(f"speed-up {s}" for s in faster[args.models[0]]),
    )
    for name, model in models.items():
        table.add_row(
            name,
            f"{count_parameters(model).total / 1e6:.2f} M",
            *(f"{v['p50']:.1f} / {v['p95']:.1f}" for v in timed[name].values()),
            *(f"{v:.2f}x" for v in faster[name].values()),
        )
    Console().print(table)
    about = environment(args.threads, dtype)
    print(machine_line(about))


def run_inspect(args: argparse.Namespace) -> None:
    from .checkpoints import load_model
    from .measure import count_parameters, macs
    from .surgery import structure_of

    model = load_model(args.model, head="encoder")
    structure, count = structure_of(model), count_parameters(model)
    most_heads, most_ffn = (max(1, *(w[i] for w in structure.layer_widths)) for i in (0, 1))
    table = Table("layer", "heads", "", "neurons", "")
    for number, (heads, ffn) in enumerate(structure.layer_widths):
        bars = ("█" * round(n / most * 20) for n, most in ((heads, most_heads), (ffn, most_ffn)))
        table.add_row(str(number), str(heads), next(bars), str(ffn), next(bars))
    Console().print(table)
    print(
        f"{type(model).__name__}: hidden {structure.hidden_size}, head {structure.head_dim}, vocabulary {structure.vocab_size}\n"
        f"parameters {count.total / 1e6:.2f} M (encoder layers {count.encoder / 1e6:.2f} M, embeddings {count.embedding / 1e6:.2f} M)\n"
        f"MACs at length 128: {macs(model, 128) / 1e9:.3f} G"
    )


if __name__ == "__main__":
    sys.exit(main())
