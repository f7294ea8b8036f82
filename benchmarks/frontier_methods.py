"""The methods of frontier.py: each makes a model of about a speed-up, from the same teacher, rows and number of training steps.

WHY the same steps: the family's member at the third speed-up has been recovered three times, so every method that is compared with it
trains for three recoveries. WHY several kinds of shapes: a method is timed at the largest shape that it can make and that reaches
the speed-up as measured here: any depth and width (uniform), whole layers only (Theseus), heads and neurons only (TextPruner).
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from datasets import Dataset, concatenate_datasets
from frontier_peers import TEXTPRUNER_FAMILIES, rows_file, run_peer, with_weights
from transformers import AutoTokenizer, PreTrainedModel, set_seed

from smbert._report_tables import prediction
from smbert.checkpoints import load_model
from smbert.context import Context, on_device
from smbert.family import AIM, TOLERANCE, compress_family, trained_for
from smbert.heads import with_head
from smbert.inputs import tokenised
from smbert.measure import latency, max_positions
from smbert.objectives import LogitsObjective
from smbert.pool import label_pool, read_pool
from smbert.recipe import Recipe
from smbert.retraining_free.search import BudgetOutOfReach
from smbert.runner import Runner, run_recipe, write_json
from smbert.stages import DepthReduction, Distill, RetrainingFreePruning, Stage, TrainingStage, WidthPruning
from smbert.surgery import keep_layers, structure_of
from smbert.target import Sizes, candidates, cut_to, with_sizes


class Skipped(Exception):
    """A method that cannot make a model of this speed-up; the message says why."""


@dataclass(frozen=True)
class Made:
    """A model, the seconds that its training and pruning took, its context where that is another than the task's, and a remark."""

    model: PreTrainedModel
    seconds: float
    context: Context | None = None
    note: str | None = None


@dataclass(frozen=True)
class Bench:
    """What the methods share on one task with one seed.

    Attributes:
        folder: for all stages of this task and seed.
        raw: the checkpoint under the task's head, not fine-tuned.
        context: of the task, with its teacher.
        texts: the splits before they were tokenised, the training rows already limited.
        recipe: of the family.
        paper: the SmBERT chain.
        speedups: ascending.
        shapes: of the checkpoint, for methods that make one of a kind (see `SHAPES_OF`).
        small: folder or id of a ready small checkpoint.
        peer_python: interpreter of TextPruner's environment.
    """

    folder: Path
    raw: PreTrainedModel
    context: Context
    texts: Mapping[str, Dataset]
    recipe: Recipe
    paper: Recipe
    speedups: Sequence[float]
    shapes: Shapes
    small: str | None = None
    peer_python: str | None = None

    @property
    def teacher(self) -> PreTrainedModel:
        assert self.context.teacher is not None
        return self.context.teacher

    def steps(self, speedup: float) -> int:
        """Optimiser steps of the family up to this member, and so of every method that is compared with it."""
        members = [s for s in self.speedups if s <= speedup]
        trained = (trained_for(stage, member) for member in members for stage in self.recipe.stages)
        return sum(steps_of(stage, self.context) for stage in trained if isinstance(stage, TrainingStage))

    def sizes(self, kind: str, speedup: float) -> Sizes:
        """Raises Skipped where no shape of this kind reaches the speed-up."""
        found = self.shapes.largest(kind, speedup)
        if found is None:
            raise Skipped(f"no shape ({SHAPES_OF[kind]}) reaches {speedup:g}x on this machine")
        return found

    def place(self, name: str, speedup: float) -> Path:
        return self.folder / f"{name}-{speedup:g}x"


# ---------------------------------------------------------------------------------------------------------- steps and shapes


def steps_of(stage: TrainingStage, context: Context) -> int:
    """Optimiser steps of a stage on the task's rows and, where it learns from a teacher, the pool's."""
    if stage.max_steps > 0:
        return stage.max_steps
    rows = len(context.data.train)
    if isinstance(stage, Distill) and context.pool is not None:
        rows = {"task": rows, "pool": len(context.pool)}.get(stage.data, rows + len(context.pool))
    rows = min(rows, stage.max_train_samples or rows)
    return max(1, math.ceil(stage.epochs * math.ceil(rows / stage.batch_size)))


def with_steps(recipe: Recipe, total: int, context: Context) -> Recipe:
    """The recipe with `total` optimiser steps, shared out among its training stages as they share them now; each has at least one.

    A replacing rate that grows by a fixed amount per step would not reach 1 in fewer steps, so its growth is scaled as well.
    """
    own = [steps_of(s, context) if isinstance(s, TrainingStage) else 0 for s in recipe.stages]
    stages: list[Stage] = []
    for place, stage in enumerate(recipe.stages):
        if isinstance(stage, TrainingStage):
            before, after = (round(total * sum(own[:end]) / sum(own)) for end in (place, place + 1))
            stage = replace(stage, max_steps=max(1, after - before))
        stages.append(replace(stage, slope=None) if isinstance(stage, DepthReduction) else stage)
    return replace(recipe, stages=tuple(stages))


SHAPES_OF = {"uniform": "of any depth and width", "depth": "of whole layers", "width": "of all layers, narrower"}


class Shapes:
    """For each kind of shape and speed-up the largest that reaches it in a batch of 32 x 128: measured when first asked for, kept in `file`."""

    def __init__(self, model: PreTrainedModel, file: Path):
        self.model, self.file = model, file
        self.reached: dict[Sizes, float] = {}

    def largest(self, kind: str, speedup: float) -> Sizes | None:
        """None where nothing of this kind reaches the speed-up."""
        known = json.loads(self.file.read_text(encoding="utf-8")) if self.file.is_file() else {}
        if f"{speedup:g}" not in known.setdefault(kind, {}):
            sizes = self._of(kind)
            low, high = 0, len(sizes)  # by falling size; the first that is fast enough
            while low < high:
                middle = (low + high) // 2
                # What counts as honoured of a member of the family is fast enough.
                fast = self._speedup(sizes[middle]) >= TOLERANCE[0] * speedup
                low, high = (low, middle) if fast else (middle + 1, high)
            known[kind][f"{speedup:g}"] = asdict(sizes[low]) if low < len(sizes) else None
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.file, known)
        found = known[kind][f"{speedup:g}"]
        return Sizes(**found) if found else None

    def _of(self, kind: str) -> list[Sizes]:
        structure = structure_of(self.model)
        layers, (heads, ffn) = structure.num_layers, map(min, zip(*structure.layer_widths))
        if kind == "uniform":
            return candidates(self.model)
        if kind == "depth":
            return [Sizes(n, heads, ffn) for n in range(layers - 1, 0, -1)]
        return [Sizes(layers, h, max(8, round(ffn * h / heads / 8) * 8)) for h in range(heads - 1, 0, -1)]

    def _speedup(self, sizes: Sizes) -> float:
        if sizes not in self.reached:
            self.reached[sizes] = speedup_of({"teacher": self.model, "candidate": cut_to(self.model, sizes)}, warmup=1)
        return self.reached[sizes]


def speedup_of(models: Mapping[str, PreTrainedModel], warmup: int) -> float:
    """How much faster the second model is, in a batch of 32 x 128."""
    shape = (32, int(min(128, *map(max_positions, models.values()))))
    models = {name: on_device(copy.deepcopy(model)) for name, model in models.items()}
    timed = latency(models, [shape], warmup=warmup, min_runs=15, min_seconds=2.0, disable_tqdm=True)
    base, own = (next(iter(timed[name].values()))["p50"] for name in models)
    return base / own


def known_speedup(bench: Bench, name: str, model: PreTrainedModel) -> float:
    """How much faster a model is than the teacher in a batch of 32 x 128: measured once, since a second run must prune to the same budget."""
    file = bench.folder / f"{name}-speedup.json"
    if not file.is_file():
        write_json(file, {"speedup": speedup_of({"teacher": bench.teacher, "candidate": model}, warmup=3)})
    return float(json.loads(file.read_text(encoding="utf-8"))["speedup"])


# ------------------------------------------------------------------------------------------------------------------ methods


def smbert(bench: Bench, speedup: float) -> Made:
    """The family, which is made as a whole."""
    return member(bench, bench.folder / "00-teacher", "family", bench.speedups, f"{speedup:g}x")


def smbert_small(bench: Bench, speedup: float) -> Made:
    """The family of the small checkpoint, after the teacher has taught it: pruned by what it lacks to each speed-up."""
    taught, name = small_taught(bench, bench.speedups[-1]), Path(bench.small or "").name
    own = known_speedup(bench, name, taught.model)
    if speedup < 1.1 * own:
        raise Skipped(f"{name} is {own:.1f} times as fast as the teacher without pruning")
    factors = {s: round(s / own, 2) for s in bench.speedups if s >= 1.1 * own}
    made = member(
        bench, bench.folder / f"{name}-taught" / "01-training", f"{name}-family", list(factors.values()), f"{factors[speedup]:g}x"
    )  # fmt: skip
    return replace(made, seconds=made.seconds + taught.seconds, context=taught.context)


def member(bench: Bench, start: Path, name: str, speedups: Sequence[float], wanted: str) -> Made:
    """One member of the family that is made, as a whole, from a fine-tuned folder."""
    folder = bench.folder / name
    place = folder / wanted / "model"
    if not place.is_dir():
        try:
            compress_family(
                start, speedups, bench.recipe, output_dir=folder, task=bench.context.data.task, train_dataset=bench.texts["train"],
                eval_dataset=bench.texts["validation"], unlabelled_dataset=bench.context.pool_texts, args=bench.context.args, seed=bench.context.seed, int8_teacher=False,
                command="benchmarks/frontier.py",
            )  # fmt: skip
        except BudgetOutOfReach as error:
            if not place.is_dir():  # members before the one that is out of reach are there
                raise Skipped(str(error)) from error
    before = [f"{s:g}x" for s in speedups]
    records = [
        json.loads(file.read_text(encoding="utf-8"))
        for earlier in before[: before.index(wanted) + 1]
        for file in (folder / earlier).glob("[0-9]*/stage.json")
    ]
    ms = next(record["latency_ms"] for record in reversed(records) if "latency_ms" in record)
    note = f"{name} {wanted}, milliseconds as the pruning predicted and then measured them: {prediction(ms)}"
    return Made(load_model(place), sum(record["seconds"] for record in records), note=note)


def paper_recipe(bench: Bench, speedup: float) -> Made:
    """The SmBERT paper's chain to a uniform shape."""
    chain = with_sizes(bench.paper, bench.teacher, bench.sizes("uniform", speedup))
    start = bench.teacher if chain.start == "teacher" else bench.raw
    return trained(bench, "paper-recipe", speedup, with_steps(chain, bench.steps(speedup), bench.context), start)


def theseus(bench: Bench, speedup: float) -> Made:
    """Module replacing alone, to fewer layers: at half of the steps all modules are replaced, and the successor is fine-tuned."""
    sizes = bench.sizes("depth", speedup)
    stage = next((s for s in bench.paper.stages if isinstance(s, DepthReduction)), DepthReduction())
    chain = Recipe((replace(stage, layers=sizes.layers, slope=None, max_steps=bench.steps(speedup)),))
    return trained(bench, "theseus", speedup, chain, bench.teacher)


def depth_first(bench: Bench, speedup: float) -> Made:
    """Module replacing to half of the layers, then the family's stages to the rest of the speed-up, each with half of the steps."""
    layers = structure_of(bench.teacher).num_layers // 2
    half = known_speedup(bench, "half", keep_layers(bench.teacher, list(range(layers))))
    if speedup < 1.1 * half:
        raise Skipped(f"half of the layers are {half:.1f} times as fast without pruning")
    first = next((s for s in bench.paper.stages if isinstance(s, DepthReduction)), DepthReduction())
    tuned, steps = bench.recipe.teacher, bench.steps(speedup)  # the paper's rate is for many more steps
    first = replace(
        first, layers=layers, keep="uniform", slope=None, max_steps=steps // 2, learning_rate=tuned.learning_rate,
        freeze_embeddings=tuned.freeze_embeddings,
    )  # fmt: skip
    rest = with_steps(bench.recipe, steps - steps // 2, bench.context).stages
    budget = {"macs": None, "params": None, "latency_ms": None, "speedup": round(AIM * speedup / half, 4)}
    chain = [replace(s, **budget) if isinstance(s, RetrainingFreePruning) else s for s in rest]
    return trained(bench, "depth-first", speedup, Recipe((first, *chain)), bench.teacher)


def truncated(bench: Bench, speedup: float) -> Made:
    """First layers and largest weights of the checkpoint, fine-tuned on labels: what the shape is worth without a teacher."""
    tuning = replace(bench.recipe.teacher, max_steps=bench.steps(speedup))
    return trained(bench, "truncated", speedup, Recipe((*cut(bench, speedup), tuning)), bench.raw)


def textbrewer(bench: Bench, speedup: float) -> Made:
    """The same start as `truncated`, taught by TextBrewer's GeneralDistiller."""
    folder = bench.place("textbrewer", speedup)
    chain = Recipe(cut(bench, speedup))
    trained(bench, "textbrewer", speedup, chain, bench.raw)
    record = run_peer(
        "textbrewer", sys.executable, folder / "student",
        "--teacher", bench.folder / "00-teacher", "--student", folder / chain.folder_names[-1],
        "--train", rows_file(bench.context, "train", bench.folder, pool=True), "--steps", bench.steps(speedup), "--seed", bench.context.seed,
    )  # fmt: skip
    return Made(load_model(folder / "student"), record["seconds"])


def textpruner(bench: Bench, speedup: float) -> Made:
    """TextPruner's heads and neurons of every layer, then the labels, as `truncated`."""
    family = structure_of(bench.teacher).family.model_type
    if family not in TEXTPRUNER_FAMILIES:
        raise Skipped(f"TextPruner knows {', '.join(TEXTPRUNER_FAMILIES)}, and not {family}")
    sizes, folder = bench.sizes("width", speedup), bench.place("textpruner", speedup)
    record = run_peer(
        "textpruner", bench.peer_python, folder / "pruned",
        "--teacher", bench.folder / "00-teacher", "--heads", sizes.heads, "--ffn", sizes.ffn, "--seed", bench.context.seed,
        "--train", rows_file(bench.context, "train", bench.folder),
        "--validation", rows_file(bench.context, "validation", bench.folder),
    )  # fmt: skip
    pruned = with_weights(folder / "pruned", bench.teacher, sizes, bench.context, record["logits"])
    tuning = replace(bench.recipe.teacher, max_steps=bench.steps(speedup))
    made = trained(bench, "textpruner", speedup, Recipe((tuning,)), pruned)
    return replace(made, seconds=made.seconds + record["seconds"])


def small(bench: Bench, speedup: float) -> Made:
    """A ready small checkpoint, fine-tuned on labels."""
    context, stage = of_small(bench), replace(bench.recipe.teacher, max_steps=bench.steps(speedup))
    return trained_small(bench, "fine-tuned", stage, context)


def small_taught(bench: Bench, speedup: float) -> Made:
    """The same, taught by the teacher's logits on the training texts, since the two may have different tokenizers."""
    context, folder = of_small(bench), bench.folder / f"{Path(bench.small or '').name}-pool"
    columns = list(context.data.task.text_columns)
    texts = [
        rows.select_columns(columns) for rows in (bench.texts["train"], bench.context.pool_texts) if rows is not None
    ]
    label_pool(
        bench.teacher, bench.context.tokenizer, context.data.task, concatenate_datasets(texts), folder,
        exclude=bench.texts["validation"], max_length=bench.recipe.max_length, disable_tqdm=context.disable_tqdm,
    )  # fmt: skip
    rows = read_pool(folder).tokenised(context.data.task, context.tokenizer, bench.recipe.max_length)
    context = replace(context, data=replace(context.data, train=rows))
    settings = next((s for s in reversed(bench.recipe.stages) if isinstance(s, Distill)), Distill())
    logits = [o for o in settings.objectives if isinstance(o, LogitsObjective)] or [LogitsObjective()]
    stage = replace(
        settings, objectives=tuple(logits), max_steps=bench.steps(speedup),
        learning_rate=bench.recipe.teacher.learning_rate, full_rate_at=None, interpolate=False,  # it does not begin near the teacher
    )  # fmt: skip
    return trained_small(bench, "taught", stage, context)


Method = Callable[[Bench, float], Made]
SIZED: dict[str, Method] = {
    "smbert": smbert,
    "smbert-small": smbert_small,
    "paper-recipe": paper_recipe,
    "theseus": theseus,
    "depth-first": depth_first,
    "truncated": truncated,
    "textbrewer": textbrewer,
    "textpruner": textpruner,
}
# One model each, whatever the speed-ups; they train as long as the last member of the family.
FIXED: dict[str, Method] = {"small": small, "small-taught": small_taught}
OF_SMALL = (*FIXED, "smbert-small")  # need a small checkpoint


# ------------------------------------------------------------------------------------------------------------------ training


def trained(bench: Bench, name: str, speedup: float, chain: Recipe, start: PreTrainedModel) -> Made:
    """The result of a chain, each stage skipped where it is done."""
    runner = Runner(bench.place(name, speedup))
    # The teacher is frozen, and a model that begins as its copy is not.
    model, records = run_recipe(chain, copy.deepcopy(start).requires_grad_(True), bench.context, runner)
    return Made(model, sum(record["seconds"] for record in records))


def cut(bench: Bench, speedup: float) -> tuple[Stage, ...]:
    """The stages that cut the raw checkpoint to a uniform shape without training."""
    sizes, structure = bench.sizes("uniform", speedup), structure_of(bench.raw)
    width = WidthPruning(heads=sizes.heads, ffn=sizes.ffn, scorer="magnitude", samples=1)
    if sizes.layers == structure.num_layers:
        return (width,)
    return DepthReduction(layers=sizes.layers, method="truncate"), width


def of_small(bench: Bench) -> Context:
    """The task in the small checkpoint's own tokens; no teacher, whose tokens these are not."""
    tokenizer = AutoTokenizer.from_pretrained(bench.small)
    data = tokenised(bench.context.data.task, bench.texts, tokenizer, bench.recipe.max_length)
    return replace(bench.context, tokenizer=tokenizer, data=data, pool=None, pool_texts=None, teacher=None)


def trained_small(bench: Bench, how: str, stage: Stage, context: Context) -> Made:
    assert bench.small is not None  # frontier.py has looked
    set_seed(context.seed)  # of the head
    start = with_head(load_model(bench.small), context.data.task)
    model, record = Runner(bench.folder / f"{Path(bench.small).name}-{how}").run(stage, start, context, "01-training")
    return Made(model, record["seconds"], context)
