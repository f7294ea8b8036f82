"""`compress()`: a checkpoint and data in; a small model and an honest report out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from ._int8_row import Served, with_int8_teacher
from ._model_card import write_whole
from ._report_tables import TEACHER
from .checkpoints import in_fp32, load_model, save_model
from .context import Context, device_of_run, on_device
from .heads import check_labels, in_order_of, is_finetuned, with_head
from .inputs import (
    as_data,
    as_intermediate,
    as_options,
    as_recipe,
    as_tokenizer,
    tokenised,
    tokenised_pool,
)
from .measure import count_parameters, environment, latency, macs, max_positions, speedups
from .processes import process_state
from .recipe import Recipe
from .report import Report, Row, model_card, write_model_card
from .runner import CONTROL, Runner, context_at_end, run_recipe, write_json
from .stages import (
    DepthReduction,
    Distill,
    EmbeddingFactorisation,
    Outline,
    Stage,
    TrainingStage,
    VocabPruning,
    WidthPruning,
)
from .surgery import structure_of
from .target import Sizes, Target, sizes_for, with_sizes
from .tasks import Task, majority_baseline
from .teacher import freeze, model_fingerprint

STUDENT, UNDISTILLED, MAJORITY = "smbert", "same shape, no distillation", "majority class"
UNTRAINED = "no task yet"
SHAPES = ((1, 128), (32, 128))


@dataclass(frozen=True)
class CompressionResult:
    """What `compress` made.

    Attributes:
        model: the compressed model, in eval mode.
        tokenizer: the checkpoint's, or what a pruning of its vocabulary has left of it.
        report: every row that was measured; also in `output_dir` as report.json, report.md and report.png.
        output_dir: stage folders, the report, and `model`, a folder that loads with `from_pretrained`.
        recipe: as it was run.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    report: Report
    output_dir: Path
    recipe: Recipe

    @property
    def model_dir(self) -> Path:
        return self.output_dir / "model"

    @property
    def target_met(self) -> bool | None:
        """Whether the target was met as measured; None without one."""
        return None if self.report.target is None else bool(self.report.target["met"])

    def save_pretrained(self, folder: str | Path) -> None:
        """Model and tokenizer, in a folder that `from_pretrained` loads."""
        save_model(self.model, folder, self.tokenizer)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> None:
        """Model and tokenizer to the Hugging Face Hub; arguments as in `PreTrainedModel.push_to_hub`."""
        self.model.push_to_hub(repo_id, **kwargs)  # type: ignore[arg-type]
        self.tokenizer.push_to_hub(repo_id, **kwargs)


def compress(
    model: str | Path | PreTrainedModel,
    recipe: str | Path | Recipe | Sequence[Stage] = "smbert",
    *,
    task: str | Task | None = None,
    data_dir: str | Path | None = None,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    text_columns: str | Sequence[str] | None = None,
    label_column: str | None = None,
    unlabelled_dataset: Dataset | None = None,
    intermediate: Mapping[str, DatasetDict] | Sequence[str] = (),
    teacher: str | Path | PreTrainedModel | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
    target: Mapping[str, Any] | None = None,
    output_dir: str | Path = "smbert-output",
    states_dir: str | Path | None = None,
    args: Mapping[str, Any] | TrainingArguments | None = None,
    seed: int = 42,
    resume: bool = True,
    baseline: bool = True,
    int8_teacher: bool = True,
    new_head: bool = False,
    trust_remote_code: bool = False,
    command: str | None = None,
) -> CompressionResult:
    """Compress an encoder with a classification or regression head, fine-tuned or raw.

    Everything is checked before any work is done. Each stage leaves a folder that loads with `from_pretrained`; a run that was
    killed goes on where it stopped when it is started again with the same arguments.

    Args:
        model: folder, Hub id or loaded model of a known family. Without a head for the task it is fine-tuned first.
        recipe: "smbert", a YAML file, a `Recipe`, or a list of stages.
        task: a GLUE task by name, or a `Task`; with `data_dir` or from the Hub. Or pass `train_dataset` and `eval_dataset`.
        data_dir: folder of the task's files.
        train_dataset, eval_dataset: texts and labels; columns are found or named.
        text_columns, label_column: names of the columns.
        unlabelled_dataset: texts without labels in the same text columns, soft-labelled by the teacher.
        intermediate: GLUE tasks by name (from `data_dir` or the Hub), or task name -> data, for stages with `task: NAME`.
        teacher: fine-tuned checkpoint to learn from; default: the model itself, fine-tuned.
        tokenizer: default: the model's own.
        compute_metrics: EvalPrediction (also a pair: logits, labels) -> {name: value}, the headline first; default: the task's metrics.
        target: {"speedup": 6}, {"params": "35%"} or {"latency_ms": 12}; sets the recipe's sizes by measuring on this device.
        output_dir: where everything goes.
        states_dir: keeps what the teacher answers for other runs with the same teacher and texts, its hidden states above all, gigabytes
            of them; by default each stage makes its own and deletes them.
        args: `TrainingArguments` fields for every training stage (bf16, gradient_accumulation_steps, report_to, ...).
        seed: of all random choices.
        resume: go on from an earlier run in `output_dir`; False starts over.
        baseline: also train a model of the same shape without distillation, for the report.
        int8_teacher: also export the teacher in int8, for the report; left out with a note where onnxruntime is not installed.
        new_head: replace a head that was trained on other labels.
        trust_remote_code: run modelling code that comes with the checkpoint.
        command: what the report names as the command that made it.

    Returns:
        The compressed model, its tokenizer and the report.

    Raises:
        ValueError, TypeError: an argument, the data, the recipe or what `output_dir` holds is unusable; the message says how to resolve it.
    """
    chain = as_recipe(recipe)
    goal = None if target is None else Target.of(target)
    options = as_options(args)
    spec, data = as_data(task, data_dir, train_dataset, eval_dataset, text_columns, label_column)
    set_seed(seed)
    student = (
        in_fp32(model) if isinstance(model, PreTrainedModel) else load_model(model, trust_remote_code=trust_remote_code)
    )
    tok = as_tokenizer(model, tokenizer, trust_remote_code)
    finetuned = is_finetuned(model) and not new_head
    if finetuned:
        spec, data = in_order_of(student, spec, data)
        check_labels(student, spec)
    master: PreTrainedModel | None = None
    if teacher is not None:
        if not is_finetuned(teacher):
            raise ValueError(
                f"`teacher` must be fine-tuned on {spec.name!r}, and has no classification head. To resolve, pass a fine-tuned one, "
                "or leave it out, so that the model itself is fine-tuned."
            )
        if isinstance(teacher, PreTrainedModel):
            # A copy, because a teacher is frozen and moved to the device of the run.
            master = copy.deepcopy(in_fp32(teacher))
        else:
            master = load_model(teacher, trust_remote_code=trust_remote_code)
        if not finetuned:
            spec, data = in_order_of(master, spec, data)
        check_labels(master, spec)
    if not finetuned:
        student = with_head(student, spec, fresh=new_head)
    runner = Runner(output_dir, resume)
    with process_state().main_process_first():
        pool, pool_texts = tokenised_pool(unlabelled_dataset, spec, tok, chain.max_length)
        context = Context(
            tokenizer=tok,
            data=tokenised(spec, data, tok, chain.max_length),
            other=as_intermediate(intermediate, data_dir, lambda t, d: tokenised(t, d, tok, chain.max_length)),
            pool=pool,
            pool_texts=pool_texts,
            cache_dir=runner.output_dir / "cache",
            states_dir=None if states_dir is None else Path(states_dir),
            args=options,
            seed=seed,
            compute_metrics=compute_metrics,
        )
    context.check_metrics()
    for what, checked in (("model", student), ("teacher", master)):
        if checked is not None:
            context.check_fits(checked, what)
    if goal is not None:
        chain = with_sizes(chain, student, _sizes(goal, student, master or student, runner))
    from_teacher = teacher is None and chain.start == "teacher"
    # Until the teacher exists, a model of its shape stands in for it in the check.
    untrained = None if finetuned or from_teacher else UNTRAINED
    chain.check(Outline(structure_of(student), task=untrained), replace(context, teacher=master or student))
    runner.refuse_another(chain)

    seconds = {}
    if master is None:
        master = copy.deepcopy(student)
        if not finetuned:
            master, record = runner.run(chain.teacher, student, context, "00-teacher")
            seconds[TEACHER] = record["seconds"]
    # Copies, since stages move what comes in to the device of the run; both answer as the task asks, whatever their configs leave open.
    begin = copy.deepcopy(master if from_teacher else student)
    for one in (master, begin):
        one.config.problem_type = spec.problem_type  # type: ignore[assignment]
    context = replace(context, teacher=freeze(master), results={"00-teacher": runner.output_dir / "00-teacher"})
    report = Report(command=command or "smbert.compress(...)", environment=environment())
    # A finished run that is started again keeps its report until the new one is there.
    begun_anew = not (runner.output_dir / chain.folder_names[-1]).is_dir()

    def so_far(records: list[dict[str, Any]]) -> None:
        report.stages = [stage_summary(record) for record in records]
        report.notes = [f"Not finished: {len(records)} of {len(chain.stages)} stages are done, nothing is timed yet."]
        if begun_anew:
            report.write(runner.output_dir)

    small, records = run_recipe(chain, begin, context, runner, so_far)
    report.notes = []
    models: dict[str, PreTrainedModel] = {TEACHER: master, STUDENT: small}
    contexts = {TEACHER: context, STUDENT: context_at_end(chain, context, runner)}
    tok = contexts[STUDENT].tokenizer
    seconds[STUDENT] = sum(r["seconds"] for r in records)
    if baseline:
        start = untaught_start(chain, student, context)
        twin_chain = undistilled(chain, small, start, len(context.data.train))
        twin_runner = Runner(runner.output_dir / CONTROL, resume)
        twin, twin_records = run_recipe(twin_chain, start, context, twin_runner)
        models[UNDISTILLED] = twin
        contexts[UNDISTILLED] = context_at_end(twin_chain, context, twin_runner)
        seconds[UNDISTILLED] = sum(r["seconds"] for r in twin_records)

    if runner.state.is_main_process:
        timed_too = goal is not None and goal.goal != "params" and goal.shape not in SHAPES
        shapes = (*SHAPES, goal.shape) if goal is not None and timed_too else SHAPES
        timed: Mapping[str, PreTrainedModel | Served] = models
        if int8_teacher:
            timed, report.notes = with_int8_teacher(models, context.tokenizer, runner.output_dir / "teacher-int8")
        for row in rows_of(timed, context, seconds, data, shapes, contexts):
            report.add(row)
        if goal is not None:
            named = {row.name: row for row in report.rows}
            report.target = goal.outcome(named[TEACHER], named[STUDENT])
        parent = str(model.name_or_path) if isinstance(model, PreTrainedModel) else str(model)
        write_result(small, tok, report, chain, runner.output_dir, parent, spec.name)
    runner.state.wait_for_everyone()
    return CompressionResult(small, tok, report, runner.output_dir, chain)


def _sizes(goal: Target, model: PreTrainedModel, baseline: PreTrainedModel, runner: Runner) -> Sizes:
    """The sizes that meet the goal: measured once per run, by the main process, and kept, so that a resumed run agrees."""
    file = runner.output_dir / "target.json"
    asked = {
        "goal": goal.goal, "value": goal.value, "shape": goal.shape_name,
        "model": model_fingerprint(model), "baseline": model_fingerprint(baseline),
    }  # fmt: skip
    known = file.is_file() and not runner.starts_over and json.loads(file.read_text())["asked"] == asked
    if runner.state.is_main_process and not known:
        runner.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(file, {"asked": asked, "sizes": asdict(sizes_for(goal, model, baseline))})
    runner.state.wait_for_everyone()
    return Sizes(**json.loads(file.read_text())["sizes"])


def untaught_start(recipe: Recipe, model: PreTrainedModel, context: Context) -> PreTrainedModel:
    """What the control begins with: a copy of `model`, or the checkpoint that the recipe puts in its place."""
    students = [s.student for s in recipe.stages if isinstance(s, Distill) and s.student]
    if not students:
        return copy.deepcopy(model)
    set_seed(context.seed)  # of a fresh head, by whose weights a resumed run knows the model again
    return with_head(load_model(students[-1]), context.data.task)


def undistilled(recipe: Recipe, small: PreTrainedModel, start: PreTrainedModel, rows: int) -> Recipe:
    """A recipe for a model of `small`'s shape that sees labels only: first layers, largest weights, plain fine-tuning.

    It gets the teacher's settings, and as many epochs, or steps, as the longest training of `recipe` on the target task.

    Args:
        recipe: of the distilled model.
        small: the distilled model.
        start: what the control is cut from.
        rows: labelled ones that it learns from.
    """
    widths = structure_of(small).layer_widths
    # Of a start whose layers differ the first ones may be narrower than those that the distilled model has kept.
    pairs = zip(widths, structure_of(start).layer_widths)
    heads, ffn = zip(*((min(h, most[0]), min(f, most[1])) for (h, f), most in pairs))
    shallower = len(widths) < structure_of(start).num_layers
    least = min(1, *(min(pair) for pair in widths))  # whole sub-layers may be missing
    stages = [recipe.teacher, *recipe.stages]
    untrained = [s for s in stages if isinstance(s, DepthReduction) and s.method == "truncate"]
    trained = [s for s in stages if isinstance(s, TrainingStage) and s.task is None and s not in untrained]
    longest = max(trained, key=lambda s: s.max_steps if s.max_steps > 0 else s.epochs * rows / s.batch_size)
    return Recipe(
        name=UNDISTILLED,
        max_length=recipe.max_length,
        stages=(
            *([DepthReduction(layers=len(widths), method="truncate")] if shallower else []),
            WidthPruning(heads=heads, ffn=ffn, scorer="magnitude", samples=1, min_heads=least, min_ffn=least),
            *(stage for stage in recipe.stages if isinstance(stage, EmbeddingFactorisation | VocabPruning)),
            replace(recipe.teacher, epochs=longest.epochs, max_steps=longest.max_steps),
        ),
    )


def rows_of(
    models: Mapping[str, PreTrainedModel | Served],
    context: Context,
    seconds: Mapping[str, float],
    raw: Mapping[str, Dataset] | None = None,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    contexts: Mapping[str, Context] | None = None,
) -> list[Row]:
    """One report row per model: metric, sizes and latency, all timed in turns in one run; and the majority class.

    What ONNX Runtime serves runs on the CPU, and is not timed against models on a GPU.

    Args:
        models: by the name of their row.
        context: of the models.
        seconds: of their training.
        raw: splits for the majority class.
        shapes: (batch, seq) of the latency.
        contexts: in place of `context` for single models, such as those with another tokenizer.
    """
    task = context.data.task
    moved = {name: model if isinstance(model, Served) else on_device(model) for name, model in models.items()}
    on_cpu = device_of_run().type == "cpu"
    longest = min(max_positions(model) for model in models.values())
    shapes = [(batch, int(min(seq, longest))) for batch, seq in shapes]
    together = {name: model for name, model in moved.items() if on_cpu or not isinstance(model, Served)}
    timed = latency(together, shapes, disable_tqdm=context.disable_tqdm)
    faster = speedups(timed, TEACHER)
    rows = []
    for name, model in moved.items():
        metrics = (contexts or {}).get(name, context).evaluate(model)  # type: ignore[arg-type]
        headline = next(iter(metrics))
        if isinstance(model, Served):
            count, stored_mb = count_parameters(models[TEACHER]), model.size_mb
        else:
            count = count_parameters(model)
            stored_mb = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
        rows.append(
            Row(
                name=name,
                task=task.name,
                seed=context.seed,
                metric_name=headline,
                metric=metrics[headline],
                metrics=metrics,
                params_total=count.total,
                params_encoder=count.encoder,
                params_embedding=count.embedding,
                macs=macs(model, 128),
                size_mb=stored_mb,
                latency_ms=timed.get(name, {}),
                speedup=faster.get(name, {}),
                train_seconds=seconds.get(name),
            )
        )
    if raw is not None and context.compute_metrics is None:
        metrics = majority_baseline(task, raw["train"], raw["validation"])
        rows.append(
            Row(
                name=MAJORITY,
                task=task.name,
                seed=context.seed,
                metric_name=task.headline,
                metric=metrics[task.headline],
                metrics=metrics,
            )
        )
    return rows


def stage_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What the report says of a stage; its metric is of a sample of the validation rows."""
    metric = next((v for k, v in record["validation"].items() if k != "rows_at_most"), None)
    told = {"name": record["name"], "seconds": record["seconds"], "metric": metric, "structure": record["layer_widths"]}
    if "latency_ms" in record:  # of a pruning to a budget of time
        told["latency_ms"] = {key: record["latency_ms"][key] for key in ("predicted", "measured")}
    return told


def write_result(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    report: Report,
    recipe: Recipe,
    folder: Path,
    parent: str,
    task: str,
) -> None:
    """The report beside the stages, and the final model with its recipe and card in `model`."""
    report.write(folder)
    place = folder / "model"
    save_model(model.cpu(), place, tokenizer)
    write_whole(place / "recipe.yaml", recipe.to_yaml().encode())
    write_model_card(place, model_card(report, STUDENT, recipe.to_yaml(), parent, LOAD_SNIPPET, task))


LOAD_SNIPPET = """
import smbert  # registers the model type; where smbert is not installed, pass trust_remote_code=True instead
from transformers import AutoModelForSequenceClassification, AutoTokenizer

model = AutoModelForSequenceClassification.from_pretrained("FOLDER_OR_ID")
tokenizer = AutoTokenizer.from_pretrained("FOLDER_OR_ID")
"""
