"""The run loop: each stage's result becomes a folder that loads with `from_pretrained`, whole or not at all.

    out/00-teacher/         the teacher, where the run had to make it
    out/01-depth_reduction/ model, tokenizer, stage.json
    out/.02-distill.work/   an unfinished stage's checkpoints; gone when the stage is done

stage.json holds the stage's configuration, a fingerprint of everything that its result depends on, the hash of the weights, and what
the stage reported. A second run skips the stages whose fingerprint still holds and goes on inside the one that was interrupted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import PreTrainedModel, set_seed

from . import __version__
from .checkpoints import load_model, save_model
from .context import Context
from .modeling import layer_widths
from .processes import process_state
from .recipe import Recipe
from .stages import STAGES, Distill, Stage, TrainingStage, VocabPruning
from .stages.distill import TARGET_TEACHER
from .teacher import dataset_fingerprint, model_fingerprint

logger = logging.getLogger(__name__)
STAGE_FILE, INPUTS_FILE = "stage.json", "inputs.json"
CONTROL = "undistilled"  # a folder of stages of its own, which goes with those of the run that it is the control of
# Rows that follow the metric from stage to stage; the report scores the whole validation split.
PROBE_ROWS = 1000


class Runner:
    """Runs stages below one output folder, and remembers what is done.

    Args:
        output_dir: where the stage folders go.
        resume: use what an earlier run left there; False starts over.

    Raises:
        ValueError: `output_dir` is a file, or nothing can be written there.
    """

    def __init__(self, output_dir: str | Path, resume: bool = True):
        self.output_dir = Path(output_dir)
        self.state = process_state()
        # What an earlier run left goes when the first stage begins: a run that is refused before must not cost it.
        self.starts_over = not resume
        _check_writable(self.output_dir)

    def refuse_another(self, recipe: Recipe) -> None:
        """ValueError where the folder holds stages of another recipe; to be called before any work."""
        if self.starts_over or not self.output_dir.is_dir():
            return
        stages = {"00-teacher": recipe.teacher, **dict(zip(recipe.folder_names, recipe.stages))}
        for folder in _stage_folders(self.output_dir):
            name = folder.name.removeprefix(".").removesuffix(".work")
            if name not in stages:
                raise ValueError(
                    f"{self.output_dir} is of another recipe: it holds {folder.name}, and the stages of {recipe.name!r} are "
                    f"{', '.join(recipe.folder_names)}. To resolve, choose another `output_dir`, go back to the old recipe, or start "
                    "over with resume=False (flag --restart)."
                )
            kept = _read_inputs(folder)
            if kept is not None:
                _refuse(folder, differences({"stage": kept.get("stage")}, {"stage": stages[name].to_dict()}))

    def start_over(self) -> None:
        """Removes the stages that an earlier run left, where this one does not resume; to be called once it has begun to work."""
        if self.starts_over and self.state.is_main_process and self.output_dir.is_dir():
            for folder in (*_stage_folders(self.output_dir), self.output_dir / CONTROL):
                if folder.is_dir():
                    shutil.rmtree(folder)
        self.starts_over = False
        self.state.wait_for_everyone()

    def run(
        self, stage: Stage, model: PreTrainedModel, context: Context, name: str
    ) -> tuple[PreTrainedModel, dict[str, Any]]:
        """One stage: skipped where its result is there, continued where it was interrupted.

        Returns:
            The result, loaded anew from its folder, and the content of its stage.json.

        Raises:
            ValueError: the folder is damaged, or holds the result of another recipe; the message says what differs.
            OSError: the disk is full; what was finished stays.
        """
        self.start_over()
        folder, workdir = self.output_dir / name, self.output_dir / f".{name}.work"
        inputs = stage_inputs(stage, model, context)
        finished = finished_stage(folder, inputs)
        if finished is None:
            unfinished_of_another(workdir, inputs)
            try:
                finished = self._do(stage, model, context, name, inputs, folder, workdir)
            except Exception as error:
                if failure := _write_failure(error):
                    raise OSError(
                        getattr(error, "errno", None) or errno.ENOSPC,
                        f"{failure}; stage {name} is not finished and the stages before it stay in {self.output_dir}. "
                        "To resolve, free space and run the same command again",
                    ) from error
                raise
        elif self.state.is_main_process:
            logger.info("stage %s is done already, skipped", name)
            shutil.rmtree(workdir, ignore_errors=True)  # a kill between the last two lines of a stage leaves it
        return load_model(folder), finished

    def _do(
        self,
        stage: Stage,
        model: PreTrainedModel,
        context: Context,
        name: str,
        inputs: dict[str, Any],
        folder: Path,
        workdir: Path,
    ) -> dict[str, Any]:
        if self.state.is_main_process:
            logger.info("stage %s begins", name)
            if workdir.exists() and _read_inputs(workdir) is None:
                shutil.rmtree(workdir)  # checkpoints of settings that nobody knows
            workdir.mkdir(parents=True, exist_ok=True)
            write_json(workdir / INPUTS_FILE, inputs)
        self.state.wait_for_everyone()
        set_seed(context.seed)
        start = time.perf_counter()
        result, info = stage.run(model, context, workdir)
        seconds = time.perf_counter() - start
        context = stage.context_after(context, workdir)
        if self.state.is_main_process:
            metrics = self._probe(result.eval(), context, getattr(stage, "task", None))
            result = result.float().cpu().eval()
            difference = self._save(
                result,
                context,
                folder,
                workdir,
                {
                    "name": name,
                    "stage": stage.to_dict(),
                    "inputs": inputs,
                    "layer_widths": [list(w) for w in layer_widths(result.config)],
                    "seconds": round(seconds, 1),
                    "validation": {"rows_at_most": PROBE_ROWS, **metrics},
                    "smbert": __version__,
                    "transformers": transformers.__version__,
                    "torch": torch.__version__,
                    **{k: v for k, v in info.items() if k != "loss_log"},
                },
                info.get("loss_log", []),
            )
            logger.info("stage %s is done; reloaded logits differ by %.1e", name, difference)
        self.state.wait_for_everyone()
        return json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))

    def _probe(self, model: PreTrainedModel, context: Context, task: str | None) -> dict[str, float]:
        """Metrics on a sample of the validation rows; none where the head that flows is not this task's."""
        if model.config.num_labels != context.data_for(task).task.num_labels:
            return {}
        return context.evaluate(model, task, PROBE_ROWS)

    def _save(
        self,
        model: PreTrainedModel,
        context: Context,
        folder: Path,
        workdir: Path,
        record: dict[str, Any],
        log: list[Any],
    ) -> float:
        """Save into the work folder, reload, compare, and only then give the result its name."""
        new = workdir / "result"
        shutil.rmtree(new, ignore_errors=True)
        save_model(model, new, context.tokenizer)
        reloaded = load_model(new)
        rows = context.data.validation.select(range(min(8, len(context.data.validation))))
        batch = {
            k: v for k, v in context.collator([rows[i] for i in range(len(rows))]).items() if k in model_inputs(context)
        }
        with torch.inference_mode():
            difference = (model(**batch).logits - reloaded(**batch).logits).abs().max().item()
        if not difference <= 1e-4:
            raise RuntimeError(
                f"the saved model of {record['name']} answers differently when loaded again (logits differ by {difference:.2e}); "
                f"it is left in {new}. To resolve, report this with the model's config.json."
            )
        write_json(new / "loss_log.json", log)
        write_json(new / STAGE_FILE, {**record, "weights_sha256": weights_hash(new)})
        new.rename(folder)
        shutil.rmtree(workdir)
        return difference


def model_inputs(context: Context) -> set[str]:
    return set(context.tokenizer.model_input_names)


def run_recipe(
    recipe: Recipe,
    model: PreTrainedModel,
    context: Context,
    runner: Runner,
    after_stage: Callable[[list[dict[str, Any]]], None] | None = None,
) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    """All stages in turn.

    Args:
        recipe: the stages.
        model: what goes into the first one; it is left alone.
        context: what all stages share.
        runner: where the stages' folders are.
        after_stage: called after each stage, on the main process, with the stage.json of every stage so far.

    Returns:
        The last stage's result and the stage.json of each stage.
    """
    runner.refuse_another(recipe)
    records = []
    for stage, name in zip(recipe.stages, recipe.folder_names):
        model, record = runner.run(stage, model, context, name)
        context = stage.context_after(context, runner.output_dir / name)
        context = replace(context, results={**context.results, name: runner.output_dir / name})
        records.append(record)
        if after_stage is not None and runner.state.is_main_process:
            after_stage(records)
    return model, records


def context_at_end(recipe: Recipe, context: Context, runner: Runner) -> Context:
    """The surroundings of the result of a recipe that has run."""
    for stage, name in zip(recipe.stages, recipe.folder_names):
        context = stage.context_after(context, runner.output_dir / name)
    return context


def stage_inputs(stage: Stage, model: PreTrainedModel, context: Context) -> dict[str, Any]:
    """Everything that a stage's result depends on, by name; small enough to be written beside it."""
    data = context.data_for(getattr(stage, "task", None))
    out: dict[str, Any] = {
        "stage": stage.to_dict(),
        "seed": context.seed,
        "model": model_fingerprint(model),
        "data": dataset_fingerprint(data.train),
        "args": {k: v for k, v in sorted(context.args.items()) if k not in IRRELEVANT_ARGS},
    }
    if isinstance(stage, TrainingStage) and stage.keep_best:
        out["validation"] = dataset_fingerprint(data.validation)
    if isinstance(stage, Distill):
        if stage.teacher in TARGET_TEACHER and context.teacher is not None:
            out["teacher"] = model_fingerprint(context.teacher)
        elif (place := Path(context.results.get(stage.teacher, stage.teacher))).is_dir():
            out["teacher"] = weights_hash(place)
        if stage.student is not None and Path(stage.student).is_dir():
            out["student"] = weights_hash(Path(stage.student))
    if context.pool is not None and stage.looks_at_pool(context):
        out["pool"] = dataset_fingerprint(context.pool)
    if isinstance(stage, VocabPruning) and (corpus := Path(stage.corpus)).is_file():
        out["corpus"] = hashlib.sha256(corpus.read_bytes()).hexdigest()
    return out


# Arguments that change what is shown or kept on the way, and not the result.
IRRELEVANT_ARGS = {
    "disable_tqdm", "logging_steps", "logging_strategy", "report_to", "run_name", "save_steps", "save_total_limit",
    "dataloader_num_workers", "log_level", "project", "save_strategy",
}  # fmt: skip


def finished_stage(folder: Path, inputs: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record of a finished stage, None where there is none.

    Raises:
        ValueError: the folder is damaged, or was made from other inputs.
    """
    if not folder.exists():
        return None
    file = folder / STAGE_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        kept, digest = record["inputs"], record["weights_sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} holds no readable {STAGE_FILE} ({type(error).__name__}), so it is not the whole result of a stage. "
            "To resolve, delete that folder and run the same command again."
        ) from error
    _refuse(folder, differences(kept, inputs))
    if weights_hash(folder) != digest:
        raise ValueError(
            f"the weights in {folder} are not those that the stage wrote: they are damaged or were changed. "
            "To resolve, delete that folder and run the same command again."
        )
    return record


def unfinished_of_another(workdir: Path, inputs: Mapping[str, Any]) -> None:
    """Refuse to continue a stage that was interrupted under other settings."""
    kept = _read_inputs(workdir)
    if kept is not None:
        _refuse(workdir, differences(kept, inputs))


def _refuse(folder: Path, changes: list[str]) -> None:
    if changes:
        what = "holds an interrupted stage" if folder.name.endswith(".work") else "was made"
        raise ValueError(
            f"{folder} {what} with other settings: {'; '.join(changes)}. To resolve, choose another `output_dir`, go back to the old "
            "settings, or start over with resume=False (flag --restart)."
        )


def _stage_folders(output_dir: Path) -> list[Path]:
    """Finished stages and the work folders of interrupted ones, and nothing else whose name begins with a number."""
    numbered = [*output_dir.glob("[0-9][0-9]-*"), *output_dir.glob(".[0-9][0-9]-*.work")]
    kinds = {"teacher", *STAGES}
    return sorted(
        folder
        for folder in numbered
        if folder.is_dir()
        and (
            folder.name.removeprefix(".").removesuffix(".work")[3:] in kinds
            or any((folder / name).is_file() for name in (STAGE_FILE, INPUTS_FILE))
        )
    )


def _read_inputs(folder: Path) -> dict[str, Any] | None:
    """What a finished or interrupted stage was made from; None where the folder does not say."""
    try:
        if folder.name.endswith(".work"):
            return dict(json.loads((folder / INPUTS_FILE).read_text(encoding="utf-8")))
        return dict(json.loads((folder / STAGE_FILE).read_text(encoding="utf-8"))["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_writable(folder: Path) -> None:
    # os.path answers False, where Path would raise, for what lies in a folder that may not be read.
    place = next(p for p in (folder, *folder.absolute().parents) if os.path.exists(p))
    if not os.path.isdir(place):
        raise ValueError(f"`output_dir` must be a folder, but {place} is a file. To resolve, choose another name.")
    if not os.access(place, os.W_OK | os.X_OK, effective_ids=os.access in os.supports_effective_ids):
        raise ValueError(f"`output_dir` must be writable, but {place} is not. To resolve, choose another folder.")


def _write_failure(error: BaseException) -> str:
    """What kept a file from being written, "" for other errors: torch.save and safetensors raise their own, without a number."""
    text, number = str(error), getattr(error, "errno", None)
    from_torch = isinstance(error, RuntimeError) and ("inline_container" in text or "iostream error" in text)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text or from_torch:
        return "the disk is full"
    if number == errno.EFBIG or "File too large" in text or isinstance(error, SafetensorError):
        return f"a file could not be written ({text.splitlines()[0]})"
    return ""


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """What changed between two JSON-like values, each change in words."""
    new = json.loads(json.dumps(new))
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        out = []
        for key in sorted(set(old) | set(new)):
            path = f"{where}.{key}" if where else str(key)
            if key not in old or key not in new:
                out.append(
                    f"`{path}` was {json.dumps(old.get(key, 'not set'))} and is {json.dumps(new.get(key, 'not set'))}"
                )
            else:
                out += differences(old[key], new[key], path)
        return out
    if old == new:
        return []
    if where in ("model", "data", "validation", "teacher", "student", "pool"):
        return [f"the {where} is another one"]
    return [f"`{where}` was {json.dumps(old)} and is {json.dumps(new)}"]


def weights_hash(folder: Path) -> str:
    """sha256 over the safetensors files of a folder; of nothing where there are none."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            for block in iter(lambda: stream.read(1 << 22), b""):
                digest.update(block)
    return digest.hexdigest()


def write_json(file: Path, value: Any) -> None:
    """Write whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    os.replace(part, file)
