"""Model cards: a README.md with the Hub's metadata, that never takes the place of somebody else's README.md."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ._report_tables import TEACHER, aggregate, markdown_table

if TYPE_CHECKING:
    from .report import Report

logger = logging.getLogger(__name__)

_MARK = re.compile(r"\n<!-- smbert model card ([0-9a-f]{16}) -->\n\Z")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_HUB_METRICS = {"f1_macro": "f1", "f1_micro": "f1", "pearson": "pearsonr"}  # the Hub's names where they differ


def model_card(
    report: Report,
    row_name: str,
    recipe_yaml: str,
    parent: str,
    load_snippet: str,
    task: str,
    *,
    pipeline_tag: str = "text-classification",
    dataset: str | None = None,
    split: str = "validation",
    language: str | Sequence[str] | None = None,
    licence: str | None = None,
    title: str | None = None,
) -> str:
    """A card in Markdown, with metadata that the Hub reads: parent, tags and the measured metrics (model-index).

    Args:
        report: holds the row of the model, and the teacher's beside it.
        row_name: name of the model's row; several seeds are averaged.
        recipe_yaml: the recipe that made the model.
        parent: Hub id or folder of the checkpoint it was made from. Of a folder only the name is shown.
        load_snippet: Python that loads the model.
        task: the row's task.
        pipeline_tag: the Hub's name for what the model does.
        dataset: Hub id of the data; None: the task's name stands for it.
        split: where the metrics were measured.
        language: codes such as "en"; None: not known, and left out.
        licence: the Hub's name, such as "apache-2.0"; None: not known, and left out.
        title: heading; None: made from the parent's name and the task.

    Raises:
        ValueError: the report has no such row.
    """
    rows = [row for row in report.rows if row.task == task]
    found = [a for a in aggregate(rows) if a.name == row_name]
    if not found:
        names = sorted({f"{row.name!r} on {row.task!r}" for row in report.rows})
        raise ValueError(f"`row_name` must be a row of the report ({', '.join(names)}), got {row_name!r} on {task!r}.")
    measured = found[0]
    on_hub = _HUB_ID.fullmatch(parent) is not None and not Path(parent).exists()
    shown_parent = f"[{parent}](https://huggingface.co/{parent})" if on_hub else f"`{Path(parent).name or parent}`"
    title = title or f"{Path(parent).name}, compressed for {task}"
    metrics = [
        {"type": _HUB_METRICS.get(name, name), "name": name, "value": round(measured.mean[f"metrics.{name}"], 4)}
        for name in measured.keys("metrics")
    ]
    metadata: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": pipeline_tag,
        "tags": ["smbert", "compressed", "pruned", "distilled"],
    }
    if language is not None:
        metadata["language"] = language if isinstance(language, str) else list(language)
    if licence is not None:
        metadata["license"] = licence
    if on_hub:
        metadata["base_model"] = parent
    if dataset is not None:
        metadata["datasets"] = [dataset]
    if metrics:
        metadata["metrics"] = list(dict.fromkeys(metric["type"] for metric in metrics))
        data = {"name": task, "type": dataset or task, "split": split}
        result = {"task": {"type": pipeline_tag}, "dataset": data, "metrics": metrics}
        metadata["model-index"] = [{"name": title, "results": [result]}]
    seeds = ", ".join(str(seed) for seed in measured.seeds if seed is not None)
    machine = report.environment
    versions = ", ".join(f"{key} {machine[key]}" for key in ("smbert", "torch", "transformers") if machine.get(key))
    on = ", ".join(str(machine[key]) for key in ("cpu", "gpu") if machine.get(key))
    threads = f", {machine['threads']} threads" if machine.get("threads") else ""
    parts = [
        "---\n" + yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True) + "---",
        f"# {title}",
        f"Made from {shown_parent} by smbert: fewer layers, attention heads and "
        f"feed-forward neurons, distilled from the original. Task: {task}. Metrics: {split} split.",
        markdown_table([a for a in aggregate(rows) if a.name in (TEACHER, row_name)]).rstrip(),
        f"Latency was measured on {on}{threads}." if on and measured.keys("latency_ms") else "",
        f"## Use\n\n```python\n{load_snippet.strip()}\n```",
        f"## Recipe\n\n```yaml\n{recipe_yaml.strip()}\n```",
        f"Made with {versions}." if versions else "",
        f"Seed: {seeds}." if seeds else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_model_card(folder: str | os.PathLike[str], card: str) -> Path:
    """Writes a card as README.md, or as README.smbert.md beside a README.md that smbert did not write, with a warning.

    A card of smbert's that was edited afterwards counts as somebody else's.

    Returns:
        The file that was written.

    Raises:
        OSError: it could not be written.
    """
    file = Path(folder) / "README.md"
    if file.exists() and not _is_own(file):
        other, file = file, file.with_name("README.smbert.md")
        logger.warning("%s was not written by smbert and is left alone; the model card is in %s.", other, file.name)
    write_whole(file, f"{card}\n<!-- smbert model card {_digest(card)} -->\n".encode())
    return file


def write_whole(file: Path, content: bytes) -> None:
    """Writes a file whole or not at all.

    Raises:
        OSError: it could not be written; an earlier file is left as it was.
    """
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        part.write_bytes(content)
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        message = f"{reason}; the earlier file, if any, is unchanged. To resolve, make room or choose another folder"
        raise OSError(error.errno, message, str(file)) from error


def _is_own(file: Path) -> bool:
    text = file.read_text(encoding="utf-8", errors="replace")
    mark = _MARK.search(text)
    return mark is not None and mark[1] == _digest(text[: mark.start()])


def _digest(card: str) -> str:
    return hashlib.sha256(card.encode()).hexdigest()[:16]
