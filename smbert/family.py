"""A family of models from one run: pruned to a speed-up, recovered, saved, and pruned on from there.

Going by steps, each with a recovery, ends better than one leap, and every step is a model that somebody can use (ZipLM, 2023).
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ._report_tables import prediction
from .compress import STUDENT, TEACHER, CompressionResult, compress
from .inputs import as_recipe
from .measure import environment
from .processes import process_state
from .recipe import Recipe
from .report import Report
from .runner import Runner
from .stages import EmbeddingFactorisation, RetrainingFreePruning, Stage, TrainingStage, VocabPruning

# Of the speed-up that was asked for: what a prediction from a table of sub-layers may miss by.
TOLERANCE = (0.95, 1.1)
AIM = sum(TOLERANCE) / 2  # two timings of one model differ by as much as 7 %, both ways


@dataclass(frozen=True)
class Family:
    """What `compress_family` returns.

    Attributes:
        members: the results by the speed-up that was asked for, each with a folder of its own.
        report: all members beside the teacher; also in the output folder as report.json, report.md and report.png.
    """

    members: dict[float, CompressionResult]
    report: Report


def compress_family(
    model: str | Path | PreTrainedModel,
    speedups: Sequence[float],
    recipe: str | Path | Recipe | Sequence[Stage] = "frontier",
    *,
    output_dir: str | Path = "smbert-family",
    command: str | None = None,
    **options: Any,
) -> Family:
    """Compress to several speed-ups, each from the result of the one before, all taught by the original.

    Each is pruned to a fortieth more than was asked for, the middle of what counts as honoured. The faster a member, the longer it is
    trained (see `trained_for`). The teacher runs over the texts once for all of them. A run that was killed goes on in the member that
    was interrupted.

    Args:
        model: folder, Hub id or loaded model, as for `compress`.
        speedups: factors above 1, measured as the recipe's `retraining_free` stage says (`shape`, `threads`). Members in
            between, even where nobody asks for them, can leave the faster ones nearer to the original.
        recipe: with exactly one `retraining_free` stage, whose budget is set for each member.
        output_dir: a folder such as "4x" for each member, and the report of all.
        command: what the report names as the command that made it.
        **options: as for `compress`, without `target`, `baseline` and `states_dir`.

    Returns:
        The members and their report.

    Raises:
        ValueError, TypeError: as `compress`; speed-ups that are no factors; a recipe that does not prune to a speed-up, or that
            changes the vocabulary or its embedding.
    """
    if not speedups or not all(isinstance(s, int | float) and not isinstance(s, bool) and s > 1 for s in speedups):
        raise ValueError(f"`speedups` must be numbers above 1, got {list(speedups)}. To resolve, try [2, 4, 6].")
    if given := sorted({"target", "baseline", "states_dir"} & set(options)):
        raise TypeError(f"`{given[0]}` must not be given for a family. To resolve, leave it out.")
    chain = as_recipe(recipe)
    pruning = [stage for stage in chain.stages if isinstance(stage, RetrainingFreePruning)]
    if len(pruning) != 1:
        raise ValueError(
            f"`recipe` must have exactly one retraining_free stage, got {', '.join(s.kind for s in chain.stages)}. "
            "To resolve, use `frontier`, or add one."
        )
    if once := [stage.kind for stage in chain.stages if isinstance(stage, VocabPruning | EmbeddingFactorisation)]:
        # The original reads no other vocabulary than its own, and what is a product already cannot be factorised again.
        raise ValueError(
            f"`recipe` must leave the embedding as it is, since all members are taught by the original on the same token ids, got "
            f"{', '.join(once)}. To resolve, leave it out, and run it on the member that you want with `smbert.compress`."
        )
    if len(set(speedups)) > 1:
        for name, value in (("database", pruning[0].database), ("latency_table", pruning[0].table_file)):
            if value is not None:
                raise ValueError(
                    f"`{name}` must not name what belongs to one model, since each member is pruned from another, got {str(value)!r}. "
                    "To resolve, leave it out: the run's cache keeps one for each member."
                )
    out = Path(output_dir)
    report = Report(command=command or "smbert.compress_family(...)", environment=environment())
    members: dict[float, CompressionResult] = {}
    int8_teacher = options.pop("int8_teacher", True)
    prune, place = pruning[0], chain.stages.index(pruning[0])
    teacher, start, reached = options.pop("teacher", None), model, 1.0
    for speedup in sorted(set(speedups)):
        # A factor on what the member before has reached: milliseconds of hours ago were another pace. Where it has reached this
        # speed-up already, a hair is left to prune.
        step = replace(
            prune, macs=None, params=None, latency_ms=None, speedup=max(1.01, round(AIM * speedup / reached, 4))
        )
        result = compress(
            start,
            replace(chain, stages=tuple(step if s is prune else trained_for(s, speedup) for s in chain.stages)),
            teacher=teacher,
            output_dir=out / f"{speedup:g}x",
            states_dir=out / "states",
            baseline=False,
            int8_teacher=int8_teacher and not members,  # the teacher of all members
            command=report.command,
            **options,
        )
        members[speedup] = result
        report.notes += [note for note in result.report.notes if note not in report.notes]
        record = result.output_dir / chain.folder_names[place] / "stage.json"
        timed = json.loads(record.read_text(encoding="utf-8"))["latency_ms"]
        # In turns with the teacher: a product of all members' factors would hold the errors of them all. Older records have those alone.
        reached = timed.get("teacher_speedup", reached * timed["speedup"])
        if len(members) == 1:
            for later in sorted(set(speedups))[1:]:  # or a restart that is interrupted could not be resumed
                Runner(out / f"{later:g}x", options.get("resume", True)).start_over()
            made = result.output_dir / "00-teacher"
            teacher = teacher or (made if made.is_dir() else model)
            options["new_head"] = False  # the members have it
        start = result.model_dir
        _add(report, speedup, result, prune, reached, prediction(timed))
        if process_state().is_main_process:
            report.write(out)
    if process_state().is_main_process:
        shutil.rmtree(out / "states", ignore_errors=True)
    return Family(members, report)


def trained_for(stage: Stage, speedup: float) -> Stage:
    """A stage as the member of this speed-up runs it: the recipe's epochs and steps hold at 2x and grow with the root of the speed-up.

    What is faster has more to repair, and its steps take less time: so all members train for about as many minutes.
    """
    if not isinstance(stage, TrainingStage):
        return stage
    longer = math.sqrt(max(speedup, 2) / 2)
    return replace(
        stage,
        epochs=round(stage.epochs * longer, 2),
        max_steps=round(stage.max_steps * longer) if stage.max_steps > 0 else stage.max_steps,
    )


def _add(
    report: Report,
    speedup: float,
    result: CompressionResult,
    prune: RetrainingFreePruning,
    pruned: float,
    predicted: str,
) -> None:
    """The member's row under its own name, the teacher's once, whether the speed-up was honoured, and what the pruning predicted.

    The rows are timed in torch with the threads of the run, at shapes of their own; where the budget was in other times, `pruned` tells:
    the stage's own factor.
    """
    rows = {row.name: row for row in result.report.rows}
    if STUDENT not in rows:  # another process measures
        return
    for name, row in rows.items():
        if name == STUDENT:
            report.add(replace(row, name=f"smbert {speedup:g}x"))
        elif name == TEACHER and any(r.name == TEACHER for r in report.rows):
            continue
        else:
            report.add(row)
    where = [] if prune.engine in (None, "torch") else [f"behind {prune.engine}"]
    where += [] if prune.threads is None else [f"with {prune.threads} thread{'' if prune.threads == 1 else 's'}"]
    reached = pruned if where else rows[STUDENT].speedup.get(prune.shape, pruned)
    honoured = TOLERANCE[0] <= reached / speedup <= TOLERANCE[1]
    report.notes.append(
        f"{' '.join([f'{speedup:g}x at {prune.shape}', *where])} was asked for and {reached:.2f}x measured: "
        f"{'honoured' if honoured else 'MISSED'}. Milliseconds as the pruning predicted and then measured them: {predicted}."
    )
