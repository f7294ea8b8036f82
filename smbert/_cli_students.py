"""The commands `smbert distill-classical` and `smbert explain`: flags become arguments of a library call."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from rich.console import Console


def add_parsers(commands: Any) -> None:
    """Adds both commands to the subparsers of the `smbert` command."""
    from .classical import STUDENTS
    from .cli import add_data_flags

    distill = commands.add_parser("distill-classical", help="teach a classical student with a classifier's soft labels")
    distill.add_argument("--model", help="teacher: folder or Hub id; without it the student learns from gold labels")
    distill.add_argument("--student", choices=STUDENTS, default="logistic_regression", help="(default: %(default)s)")
    add_data_flags(distill)
    group = distill.add_argument_group("student")
    group.add_argument("--unlabelled-file", help="more texts, which the teacher labels: csv, json, jsonl or parquet")
    group.add_argument("--stream", action="store_true", help="read --unlabelled-file chunk by chunk, not into memory")
    group.add_argument("--words", help="shortest and longest word n-gram such as 1,2; 'none' for no words")
    group.add_argument("--chars", help="shortest and longest character n-gram such as 2,5, for scripts without spaces")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="changes",
        help="a setting: temperature=2, gold_weight=0, folds=5, seed=1, ... (see smbert.classical.Settings)",
    )  # fmt: skip
    group.add_argument("--output-dir", default="smbert-student", help="(default: %(default)s)")
    group.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    group.add_argument("--disable-tqdm", action="store_true", help="no progress bars")
    distill.set_defaults(run=run_distill)

    explain = commands.add_parser("explain", help="show which words made a classifier, and its student, decide")
    explain.add_argument("models", nargs="+", help="one or two: folders of checkpoints or students, or Hub ids")
    explain.add_argument("--text", action="append", default=[], help="a text to explain; may be repeated")
    explain.add_argument("--text-pair", action="append", default=[], help="the second text of each --text, for pairs")
    explain.add_argument("--limit", type=int, default=20, help="validation rows, without --text (default: %(default)s)")
    explain.add_argument("--label", help="the label to explain (default: the first model's, for each text)")
    add_data_flags(explain)
    group = explain.add_argument_group("LIME")
    group.add_argument("--samples", type=int, default=1000, help="variants of each text (default: %(default)s)")
    group.add_argument("--ngram", type=int, default=1, help="words left out together (default: %(default)s)")
    group.add_argument("--seeds", type=int, default=3, help="for the stability (default: %(default)s)")
    group.add_argument("--seed", type=int, default=0, help="the first (default: %(default)s)")
    group.add_argument("--top", type=int, default=10, help="words that are compared (default: %(default)s)")
    group.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    group.add_argument("--output-dir", default="smbert-explanations", help="(default: %(default)s)")
    explain.add_argument("--disable-tqdm", action="store_true", help="no progress line")
    explain.set_defaults(run=run_explain)


def run_distill(args: argparse.Namespace) -> None:
    from .checkpoints import load_model
    from .classical import distill_classical, texts_of
    from .classical.files import check_free
    from .cli import data_of, pairs
    from .context import on_device
    from .heads import label_names
    from .inputs import as_tokenizer
    from .tasks import majority_baseline

    check_free(Path(args.output_dir))
    settings = pairs(args.changes, "--set")
    settings |= {"features": features} if (features := _features(args, settings)) is not None else {}
    pool = _pool(args)
    teacher = tokenizer = None
    if args.model is not None:
        teacher = on_device(load_model(args.model, trust_remote_code=args.trust_remote_code))
        tokenizer = as_tokenizer(args.model, args.tokenizer, args.trust_remote_code)
        if args.label_names is None and args.train_file:
            args.label_names = label_names(teacher)
    task, data = data_of(args)
    if args.max_length is not None:
        settings["max_length"] = args.max_length
    student = distill_classical(
        teacher,
        data["train"],
        pool,
        args.student,
        task=task,
        tokenizer=tokenizer,
        held_out=data["validation"],
        cache_dir=Path(args.output_dir).with_name(f"{Path(args.output_dir).name}-cache"),
        **{"disable_tqdm": args.disable_tqdm, **settings},
    )
    student.save(args.output_dir)
    texts = texts_of(data["validation"], task)
    found = task.compute(student.predict_logits(texts), list(data["validation"][task.label_column]))
    majority = majority_baseline(task, data["train"], data["validation"])
    print(f"{args.student}, taught by {student.training['taught_by']}, {student.num_parameters:,} parameters")
    for name, value in found.items():
        print(f"{task.name} validation {name} {value:.4f} (majority class {majority[name]:.4f})")
    for name in ("pool", "pool_also_held_out", "pool_also_labelled", "labelled_also_held_out"):
        if name in student.training:
            print(f"texts: {name.replace('_', ' ')} {student.training[name]}")
    print(f'\nimport smbert\nprint(smbert.load_student("{args.output_dir}")("your text"))')


def run_explain(args: argparse.Namespace) -> None:
    from .classical import texts_of
    from .cli import data_of
    from .explain import LimeSettings, explain_all
    from .explain.terminal import terminal_view

    if len(args.models) > 2:
        raise ValueError(f"`models` must be one or two, got {len(args.models)}. To resolve, leave some out.")
    if args.text_pair and len(args.text_pair) != len(args.text):
        raise ValueError(
            f"`--text-pair` must be there once for each `--text`, got {len(args.text_pair)} for {len(args.text)}. "
            "To resolve, pass both equally often."
        )
    settings = LimeSettings(samples=args.samples, ngram=args.ngram, seed=args.seed)
    classifiers = [_classifier(place, args) for place in args.models]
    # A checkpoint may only have numbers where the student has names.
    names = next((c.label_names for c in classifiers if args.label in c.label_names), ())
    if args.label is not None and not names:
        known = " or ".join(", ".join(c.label_names) for c in classifiers)
        raise ValueError(f"`--label` must be one of {known}, got {args.label!r}. To resolve, choose one.")
    if args.text:
        texts: list[Any] = list(zip(args.text, args.text_pair)) if args.text_pair else args.text
    else:
        task, data = data_of(args, ("validation",))
        rows = data["validation"].shuffle(seed=args.seed)
        texts = texts_of(rows.select(range(min(max(args.limit, 1), len(rows)))), task)
    label = None if args.label is None else names.index(args.label)
    found = explain_all(classifiers, texts, label, settings, args.seeds, args.top, args.disable_tqdm)
    found.save(args.output_dir)
    # Where the output is no terminal rich assumes 80 columns.
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(terminal_view(found.to_dict()))
    print(f"\npage  {Path(args.output_dir) / 'explanations.html'}")


def _classifier(place: str, args: argparse.Namespace) -> Any:
    """A student's folder, or a checkpoint."""
    from .checkpoints import load_model
    from .classical import load_student
    from .classical.files import ABOUT
    from .context import on_device
    from .explain import as_classifier
    from .inputs import as_tokenizer

    name = Path(place).name
    if (Path(place) / ABOUT).is_file():
        return as_classifier(load_student(place), name=name)
    model = on_device(load_model(place, trust_remote_code=args.trust_remote_code))
    tokenizer = as_tokenizer(place, args.tokenizer, args.trust_remote_code)
    return as_classifier(model, tokenizer, name=name, max_length=args.max_length)


def _features(args: argparse.Namespace, settings: dict[str, Any]) -> Any:
    """The features that the flags change; None for the student's own."""
    from .classical.kinds import KINDS

    if "features" in settings:
        raise ValueError("`features` must be set by --words and --chars. To resolve, use these flags.")
    if args.words is None and args.chars is None:
        return None
    if args.student not in KINDS:
        raise ValueError(
            f"--words and --chars are of students that count n-grams, got {args.student}. To resolve, leave them out."
        )
    values: dict[str, Any] = {}
    for name in ("words", "chars"):
        if (text := getattr(args, name)) is not None:
            try:
                values[name] = None if text == "none" else tuple(int(part) for part in text.split(","))
            except ValueError:
                raise ValueError(f"`--{name}` must look like 1,2, got {text!r}. To resolve, correct it.") from None
    return replace(KINDS[args.student].features, **values)


def _pool(args: argparse.Namespace) -> Dataset | IterableDataset | None:
    from ._rows import BUILDERS, read_files, reading_options

    if args.unlabelled_file is None:
        if args.stream:
            raise ValueError("`--stream` needs `--unlabelled-file`. To resolve, pass the file, or leave --stream out.")
        return None
    path = Path(args.unlabelled_file)
    if not args.stream:
        return read_files([path])
    if path.suffix.lower() not in BUILDERS or not path.is_file():
        raise ValueError(
            f"`--unlabelled-file` must be a file of {', '.join(BUILDERS)}, got {path}. To resolve, correct the name."
        )
    builder, options = BUILDERS[path.suffix.lower()], reading_options(path)
    return load_dataset(builder, data_files=str(path), split="train", streaming=True, **options)  # type: ignore[return-value]
