"""Recipe: a chain of stages, the same thing in YAML and in Python.

name: two steps
max_length: 128
teacher: {epochs: 3, learning_rate: 2.0e-5}     # how the teacher is made where the checkpoint is not fine-tuned yet
start: teacher                                  # or checkpoint: the chain begins at the raw encoder
stages:
  - {kind: depth_reduction, layers: 1/2}
  - {kind: distill, objectives: [{kind: logits, weight: 5}, {kind: hidden, weight: 2}]}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from .context import Context
from .stages import STAGES, Distill, Finetune, Outline, Stage, build
from .stages.distill import TARGET_TEACHER

# A wheel carries the recipes inside the package; in a checkout they lie beside it.
BUILT_IN = next(p for p in (Path(__file__).with_name("recipes"), Path(__file__).parents[1] / "recipes") if p.is_dir())


@dataclass(frozen=True)
class Recipe:
    """A chain of stages.

    Attributes:
        stages: run in this order.
        name: for reports.
        teacher: makes the teacher where the checkpoint has no head for the task yet.
        start: "teacher" hands the teacher to the first stage, "checkpoint" the checkpoint as it came.
        max_length: most tokens per row.
    """

    stages: tuple[Stage, ...]
    name: str = "custom"
    teacher: Finetune = field(default_factory=Finetune)
    start: str = "teacher"
    max_length: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if faults := _header_faults(self.start, self.max_length):
            raise ValueError(_several("the recipe", faults))
        for stage in self.stages:
            _check_stage(stage)

    @property
    def folder_names(self) -> list[str]:
        """Where each stage's result goes: 01-depth_reduction, 02-distill, ... (00-teacher is the teacher)."""
        return [f"{i:02d}-{stage.kind}" for i, stage in enumerate(self.stages, 1)]

    @property
    def tasks(self) -> list[str]:
        """Intermediate tasks that the stages name."""
        return sorted({t for s in self.stages if (t := getattr(s, "task", None)) is not None})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """From the YAML form; every fault of every part in one ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(
                f"a recipe must be a mapping with the key `stages`, got {type(values).__name__}. To resolve, see the README."
            )
        faults, stages = [], []
        known = [f.name for f in fields(cls)]
        if unknown := sorted(set(values) - set(known)):
            faults.append(
                f"unknown key {', '.join(unknown)}; known keys are {', '.join(known)}. To resolve, correct or drop it."
            )
        faults += _header_faults(values.get("start", cls.start), values.get("max_length", cls.max_length))
        items = values.get("stages")
        if not isinstance(items, list | tuple) or not items:
            faults.append("`stages` must be a list of at least one stage. To resolve, add one.")
            items = []
        for number, item in enumerate(items, 1):
            try:
                stages.append(_check_stage(build(STAGES, item, "stage")))
            except (ValueError, TypeError) as error:
                faults.append(f"stage {number}: {error}")
        teacher = Finetune()
        try:
            if not isinstance(given := values.get("teacher", {}), Mapping):
                raise ValueError(
                    f"it must be a mapping such as {{epochs: 3}}, got {given!r}. To resolve, correct or drop it."
                )
            teacher = build({"finetune": Finetune}, {"kind": "finetune", **given}, "teacher")
        except (ValueError, TypeError) as error:
            faults.append(f"teacher: {error}")
        if faults:
            raise ValueError(_several("the recipe", faults))
        rest = {k: v for k, v in values.items() if k not in ("stages", "teacher")}
        return cls(stages=tuple(stages), teacher=teacher, **rest)

    def to_dict(self) -> dict[str, Any]:
        """The YAML form."""
        teacher = {k: v for k, v in self.teacher.to_dict().items() if k != "kind"}
        return {
            "name": self.name,
            "start": self.start,
            "max_length": self.max_length,
            "teacher": teacher,
            "stages": [stage.to_dict() for stage in self.stages],
        }

    @classmethod
    def from_yaml(cls, text_or_path: str | Path) -> Recipe:
        """From a file, or from YAML text (anything with a line break)."""
        text = str(text_or_path)
        if "\n" not in text:
            path = Path(text_or_path)
            if not path.is_file():
                raise ValueError(
                    f"`recipe` must be a YAML file, but there is no file {path}. To resolve, check the path."
                )
            text = path.read_text(encoding="utf-8")
        try:
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(
                f"the recipe is not YAML: {' '.join(str(error).split())}. To resolve, correct it."
            ) from error
        return cls.from_dict(values)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def named(cls, name: str) -> Recipe:
        """A recipe that ships with smbert, by name."""
        path = BUILT_IN / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in BUILT_IN.glob("*.yaml")))
            raise ValueError(
                f"`recipe` must be a YAML file, a Recipe, stages, or one of {known}, got {name!r}. To resolve, choose one."
            )
        return cls.from_yaml(path)

    def override(self, changes: Mapping[str, Any]) -> Recipe:
        """The recipe with keys set by path, such as {"max_length": 64, "teacher.epochs": 1, "stages.2.epochs": 4} (stages from 1)
        or {"distill.epochs": 2} (every stage of that kind)."""
        values = self.to_dict()
        faults = []
        for path, value in changes.items():
            head, _, rest = path.partition(".")
            if head == "stages" and rest.count(".") == 1 and rest.split(".")[0].isdigit():
                number, key = rest.split(".")
                targets = values["stages"][int(number) - 1 : int(number)]
            elif head in STAGES and rest:
                targets, key = [s for s in values["stages"] if s["kind"] == head], rest
            elif head == "teacher" and rest:
                targets, key = [values["teacher"]], rest
            else:
                targets, key = [values], path
            if not targets:
                faults.append(
                    f"{path!r} names no stage of this recipe. To resolve, use one of {', '.join(self.folder_names)}."
                )
            for target in targets:
                target[key] = value
        if faults:
            raise ValueError(_several("the recipe", faults))
        return type(self).from_dict(values)

    def through(self, task: str) -> Recipe:
        """The same chain on an intermediate task, from the raw checkpoint; its last stage is then repeated on the target task.

        The paper's way for small data sets: one compressed encoder, made on MNLI, serves every target task.
        """
        moved: list[Stage] = [replace(self.teacher, task=task)]
        # The finetune stage in front takes number 01.
        names = {
            name: f"{i:02d}-{stage.kind}" for i, (name, stage) in enumerate(zip(self.folder_names, self.stages), 2)
        }
        names |= dict.fromkeys(TARGET_TEACHER, f"01-{Finetune.kind}")
        for stage in self.stages:
            # A vocabulary is that of the target task wherever the stage stands.
            changes: dict[str, Any] = {"task": task} if hasattr(stage, "task") else {}
            if isinstance(stage, Distill):
                changes["teacher"] = names.get(stage.teacher, stage.teacher)
            moved.append(replace(stage, **changes))  # type: ignore[arg-type]
        return replace(self, name=f"{self.name} through {task}", start="checkpoint", stages=(*moved, self.stages[-1]))

    def check(self, before: Outline, context: Context) -> Outline:
        """Walk through the stages without running them.

        Raises:
            ValueError: every stage that cannot work, in one message.
        """
        faults, names = [], self.folder_names
        outline = replace(before, done=("00-teacher",))
        for number, stage in enumerate(self.stages):
            try:
                outline = stage.outline(outline, context)
            except (ValueError, TypeError) as error:
                faults.append(f"stage {names[number]}: {error}")
            else:
                outline = replace(outline, results={**outline.results, names[number]: outline})
            outline = replace(outline, done=(*outline.done, names[number]))
        if not faults and outline.task is not None:
            faults.append(
                f"the last stage leaves a model with the head of {outline.task!r}, not of {context.data.task.name!r}. "
                "To resolve, end with a finetune or distill stage on the target task."
            )
        if faults:
            raise ValueError(_several("the recipe", faults))
        return outline


def _check_stage(stage: Any) -> Stage:
    if not isinstance(stage, Stage):
        raise TypeError(f"`stages` must hold stages, got {stage!r}. To resolve, use {', '.join(STAGES)}.")
    return stage


def _header_faults(start: Any, max_length: Any) -> list[str]:
    faults = []
    if start not in ("teacher", "checkpoint"):
        faults.append(f"`start` must be teacher or checkpoint, got {start!r}. To resolve, choose one of them.")
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 1:
        faults.append(f"`max_length` must be a whole number above 0, got {max_length!r}. To resolve, try 128.")
    return faults


def _several(what: str, faults: list[str]) -> str:
    return (
        faults[0] if len(faults) == 1 else f"{what} has {len(faults)} faults:\n" + "\n".join(f"  - {f}" for f in faults)
    )
