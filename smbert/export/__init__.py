"""From a checkpoint to a folder that serves it without torch: ONNX graph, tokenizer, runtime and a manifest of all of it.

export("model", "model-int8", precision="int8", gate=Gate(task, validation_rows, max_drop=0.5), calibration=texts)

model-int8/model.onnx        fp32, fp16 or int8; dynamic batch and length
           tokenizer.json    as `tokenizers` reads it
           runtime.py        smbert/runtime.py, which needs the engine, tokenizers and numpy
           manifest.json     engine, inputs, labels, versions, parent, hashes, and what the gate measured

The engine is onnxruntime or, where it is installed, OpenVINO, which reads the same kind of graph.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import runtime
from ..checkpoints import load_model, put_in_place
from ..heads import is_finetuned
from ..inputs import as_tokenizer
from ..measure import max_positions, size_mb
from ..runner import weights_hash
from ..tasks import KINDS
from ..teacher import model_fingerprint
from .gate import Gate, Reference
from .onnx_graph import input_names, largest_difference, write_onnx
from .quantise import PRECISIONS, Batches, Setting, convert, ladder, sensitive_layers

__all__ = ["ENGINES", "Exported", "Gate", "Setting", "export"]

logger = logging.getLogger(__name__)

ENGINES = tuple(PRECISIONS)
ENGINE_PACKAGES = {"onnx": "onnxruntime", "openvino": "openvino"}
MODEL, TOKENIZER, RUNTIME = "model.onnx", "tokenizer.json", "runtime.py"
# fp32 sums in another order; the logits of a classifier are of the order of 1 to 10.
TOLERANCE = 1e-4
# The legacy exporter's newest LayerNormalization is of 17; onnxruntime 1.20 reads it and all before.
OPSETS = range(14, 21)


@dataclass(frozen=True)
class Exported:
    """What `export` wrote.

    Attributes:
        folder: where.
        manifest: the content of its manifest.json.
        setting: how the graph is stored; safer than what was asked for where the gate demanded it.
        size_mb: of the graph.
    """

    folder: Path
    manifest: dict[str, Any]
    setting: Setting
    size_mb: float


def export(
    model: str | Path | PreTrainedModel,
    output_dir: str | Path,
    *,
    engine: str = "onnx",
    precision: str = "fp32",
    method: str = "dynamic",
    per_channel: bool = True,
    gate: Gate | None = None,
    calibration: Sequence[Any] = (),
    max_length: int | None = None,
    opset: int = 17,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> Exported:
    """Writes a fine-tuned checkpoint as a folder for `smbert.runtime.Classifier`, whole or not at all.

    Args:
        model: folder, Hub id or loaded model, with a classification or regression head.
        output_dir: a new folder, or an earlier export, which is replaced.
        engine: "onnx", or "openvino".
        precision: "fp32", "fp16" (onnx), "bf16" (openvino, on a CPU that has it) or "int8".
        method: int8 only: "dynamic", or "static", which needs `calibration`.
        per_channel: int8 only: one scale per output of a weight.
        gate: validation rows on which the artefact is measured, and what it may lose.
        calibration: texts, or pairs of texts, like those that will be served; some hundred are enough.
        max_length: most tokens of a row; default: the most that the model has positions for.
        opset: of the graph.
        tokenizer: default: the checkpoint's own.
        trust_remote_code: run modelling code that comes with the checkpoint.

    Raises:
        ValueError: an argument is unusable, a package is missing, or no setting passes the gate; nothing is written.
        OSError: the disk is full or not writable; an earlier export is as it was.
    """
    start = Setting(precision, method, per_channel)
    target = Path(os.path.abspath(output_dir))
    _check_arguments(engine, opset, start, calibration)
    _check_target(target)
    loaded = model if isinstance(model, PreTrainedModel) else load_model(model, trust_remote_code=trust_remote_code)
    if not is_finetuned(model):
        what = "the model" if loaded is model else model
        raise ValueError(f"{what} has no trained classification head. To resolve, fine-tune it, or compress it.")
    tok = as_tokenizer(model, tokenizer, trust_remote_code)
    if not isinstance(getattr(tok, "backend_tokenizer", None), Tokenizer):
        raise ValueError(
            f"the tokenizer must be a fast one, which works without transformers, got {type(tok).__name__}. "
            "To resolve, save its tokenizer.json beside the model."
        )
    length = _max_length(loaded, tok, max_length)
    reference = None if gate is None else Reference.of(gate, loaded, tok, length)
    sample = list(calibration) or ([] if gate is None else gate.texts[:64])

    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        workdir = partial / "work"
        workdir.mkdir(parents=True)
        traced = workdir / "fp32.onnx"
        names = write_onnx(loaded, input_names(loaded, tok), traced, opset)
        batches = _batches(sample, tok, names, length)
        difference = largest_difference(loaded, names, runtime.open_graph(traced, engine), length)
        if not difference <= TOLERANCE:
            raise RuntimeError(
                f"{engine} answers differently from torch (logits differ by {difference:.1e}). To resolve, try another `opset`, or "
                "report this with the model's config.json."
            )
        tok.backend_tokenizer.save(str(partial / TOKENIZER))  # type: ignore[attr-defined]
        shutil.copyfile(runtime.__file__, partial / RUNTIME)
        manifest = {
            **_about_model(loaded, tok, names, length, gate),
            "engine": engine,
            "opset": opset,
            "parent": _parent(model, loaded),
            "versions": _versions(engine),
            "parity": {"largest_logit_difference_fp32": difference},
        }
        safer = gate is not None and gate.max_drop is not None and gate.fallback
        settings = (
            ladder(start, lambda: sensitive_layers(traced, loaded, batches, workdir, engine), bool(calibration))
            if safer
            else iter([start])
        )
        setting, judged = _first_that_passes(settings, traced, loaded, batches, partial, manifest, reference)
        shutil.rmtree(workdir)
        _write_manifest(partial, {**manifest, **judged, "setting": setting.to_dict()})
        put_in_place(partial, target)
    except OSError as error:
        raise OSError(
            error.errno,
            f"could not write {target}: {error.strerror or error}. An earlier export is as it was. To resolve, free disk space or choose a "
            "writable folder",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(target, runtime.read_manifest(target), setting, size_mb(target / MODEL))


def _first_that_passes(
    settings: Iterable[Setting],
    traced: Path,
    model: PreTrainedModel,
    batches: Batches,
    folder: Path,
    manifest: dict[str, Any],
    reference: Reference | None,
) -> tuple[Setting, dict[str, Any]]:
    """Writes the graph in one setting after the other until one passes: that setting, and what the manifest says of the gate.

    Raises:
        ValueError: none passes.
    """
    attempts: list[dict[str, Any]] = []
    for setting in settings:
        sample = batches if setting.method == "static" else ()
        convert(traced, folder / MODEL, setting, model, sample, manifest["engine"])
        if reference is None:
            return setting, {}
        _write_manifest(folder, {**manifest, "setting": setting.to_dict()})
        attempts.append({"setting": str(setting), **reference.judge(folder)})
        logger.info("%s: %+.2f points", setting, -attempts[-1]["drop_points"])
        if attempts[-1]["passed"]:
            return setting, {"gate": reference.summary(attempts)}
    assert reference is not None  # without one the first setting is taken
    raise ValueError(_refusal(reference, attempts))


def _check_arguments(engine: str, opset: int, setting: Setting, calibration: Sequence[Any]) -> None:
    if engine not in ENGINES:
        raise ValueError(f"`engine` must be one of {', '.join(ENGINES)}, got {engine!r}. To resolve, choose one.")
    if setting.precision not in PRECISIONS[engine]:
        raise ValueError(
            f"`precision` must be one of {', '.join(PRECISIONS[engine])} for {engine}, got {setting.precision!r}. To resolve, choose one."
        )
    if opset not in OPSETS:
        raise ValueError(f"`opset` must be from {OPSETS[0]} to {OPSETS[-1]}, got {opset!r}. To resolve, use 17.")
    if isinstance(calibration, str):
        raise ValueError("`calibration` must be a list of texts, got one text. To resolve, pass [text, ...].")
    if setting.precision == "int8" and setting.method == "static" and not calibration:
        raise ValueError(
            "`calibration` must hold texts for static int8, got none. To resolve, pass some hundred training texts, or use the dynamic "
            "method."
        )
    for package in dict.fromkeys(("onnx", "onnxruntime", ENGINE_PACKAGES[engine])):
        if not _installed(package):
            raise ValueError(f"export needs {package}. To resolve, pip install smbert[{engine}].")
    if setting.precision == "bf16":
        import openvino

        if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise ValueError(
                "`precision` bf16 needs a CPU that multiplies bf16 itself, and this one does not. To resolve, use fp32 or int8."
            )


def _check_target(folder: Path) -> None:
    """ValueError where something lies that is no export: nobody's files are replaced but our own."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`output_dir` must be a folder, got the file {folder}. To resolve, choose another name.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / runtime.MANIFEST).is_file():
        raise ValueError(
            f"`output_dir` must be new, empty or an earlier export, and {folder} holds other files. To resolve, choose another name."
        )


def _max_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: int | None) -> int:
    config: Any = model.config
    most = int(min(tokenizer.model_max_length, max_positions(model), config.max_position_embeddings))
    least = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if asked is None:
        return most
    if isinstance(asked, bool) or not isinstance(asked, int) or not least <= asked <= most:
        raise ValueError(
            f"`max_length` must be from {least} to {most} for this model, got {asked!r}. To resolve, leave it out."
        )
    return asked


def _batches(
    texts: Sequence[Any], tokenizer: PreTrainedTokenizerBase, names: Sequence[str], max_length: int, size: int = 16
) -> Batches:
    out = []
    for start in range(0, len(texts), size):
        some = texts[start : start + size]
        columns = [list(c) for c in zip(*some)] if isinstance(some[0], tuple | list) else [list(some)]
        encoded = tokenizer(*columns, truncation=True, max_length=max_length, padding=True, return_tensors="np")
        out.append({name: encoded[name].astype(np.int64) for name in names})
    return out


def _about_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], max_length: int, gate: Gate | None
) -> dict[str, Any]:
    """What the runtime has to know."""
    config: Any = model.config
    fillers = {
        "input_ids": tokenizer.pad_token_id or 0,
        "attention_mask": 0,
        "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0),
    }
    kinds = {problem: kind for kind, problem in KINDS.items()}
    kind = kinds.get(config.problem_type or "", "regression" if config.num_labels == 1 else "single_label")
    return {
        "format": runtime.FORMAT,
        "model": MODEL,
        "tokenizer": TOKENIZER,
        "inputs": {name: fillers[name] for name in names},
        "kind": kind,
        "labels": [] if kind == "regression" else [str(config.id2label[i]) for i in range(config.num_labels)],
        # Without a task nobody knows whether the model was trained on pairs; both are then taken.
        "texts_per_row": None if gate is None else len(gate.task.text_columns),
        "max_length": max_length,
        "truncation_side": tokenizer.truncation_side,
    }


def _write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    files = {name: runtime.sha256(folder / name) for name in (MODEL, TOKENIZER, RUNTIME)}
    text = json.dumps({**manifest, "files": files}, indent=1, ensure_ascii=False)
    (folder / runtime.MANIFEST).write_text(text + "\n", encoding="utf-8")


def _refusal(reference: Reference, attempts: Sequence[dict[str, Any]]) -> str:
    tried = "; ".join(
        f"{a['setting']} loses {a['drop_points']:.2f} points ({a['metric']:.4f})"
        if a.get("finite", True)
        else f"{a['setting']} answers NaN or infinity"
        for a in attempts
    )
    gate = reference.gate
    if gate.max_drop is None:
        return f"the artefact's answers must be finite: {tried}. Nothing was written. To resolve, use fp32 or int8."
    return (
        f"no artefact may lose more than {gate.max_drop} points of torch's {gate.task.headline} "
        f"{reference.metric(reference.logits):.4f} on {len(gate.rows)} rows of {gate.task.name!r}, and {tried}. Nothing was written. "
        f"To resolve, allow more{'' if gate.fallback else ', or let safer settings be tried'}."
    )


def _parent(given: str | Path | PreTrainedModel, model: PreTrainedModel) -> dict[str, str | None]:
    """The checkpoint's name, of a folder without its path, the hash of its weights where it is one, and the loaded model's own."""
    in_memory = isinstance(given, PreTrainedModel)
    name = str(given.name_or_path if isinstance(given, PreTrainedModel) else given)
    local = name != "" and (Path(name).is_dir() or Path(name).is_absolute())
    return {
        "name": Path(name).resolve().name if local else name,
        "weights_sha256": weights_hash(Path(name)) if local and not in_memory else None,
        "fingerprint": model_fingerprint(model),
    }


def _versions(engine: str) -> dict[str, str]:
    packages = ("smbert", "torch", "transformers", "tokenizers", "onnx", "onnxruntime", ENGINE_PACKAGES[engine])
    return {name: importlib.metadata.version(name) for name in packages if _installed(name)}


def _installed(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # smbert run from a checkout
        return False
    return True
