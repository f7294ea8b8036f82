"""Answers from an exported folder with its engine, tokenizers and numpy alone: no torch, no transformers, no rest of smbert.

    from runtime import Classifier          # this file lies in every exported folder; or: from smbert.runtime import Classifier
    classify = Classifier("FOLDER")
    classify("a text")                      # {"label": "positive", "score": 0.98}
    classify(["one", "two"])                # a list of such answers
    classify(("first", "second"))           # a pair; a list of pairs likewise

    python FOLDER/runtime.py "a text" ...   # one JSON answer per line

What happens to unusual input: a text longer than the manifest's `max_length` is cut (of a pair the longer text first), an empty text is
answered like any other, everything but str is a TypeError, and a str that UTF-8 cannot say (lone surrogates, which is what undecodable
bytes become) is a ValueError. In int8 with dynamic ranges the answer to a text depends a little on its batch, as the ranges do.

The engine, onnxruntime or openvino, is the one that the manifest names; the other need not be installed. This file is self-contained
on purpose.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

MANIFEST = "manifest.json"
FORMAT = 1

Text = str | tuple[str, str]
# Inputs by name, each (batch, length) int64, to logits (batch, labels).
Graph = Callable[[dict[str, np.ndarray]], np.ndarray]


class Classifier:
    """A classification or regression model behind its engine; may be shared by threads.

    Args:
        folder: written by `smbert export`.
        threads: CPU threads of one answer; None leaves it to the engine (all physical cores). A service that answers several requests
            at once is faster with 1 and its own threads in onnxruntime, and with several processes in openvino, which answers one
            request after the other.
        batch_size: most texts of one batch. Texts of similar length share a batch, so that little is spent on padding.
        providers: onnxruntime's execution providers, the preferred first; openvino runs on the CPU.
        verify: compare the files' hashes with the manifest before they are used.
        warm: answer once while loading, so that the first request does not pay for it.
        spinning: onnxruntime's threads wait busily for the next request, which is faster; False leaves the CPU to others meanwhile.

    Raises:
        ValueError: no manifest, one of another format, a missing file, a file that is not the one that was exported, or an engine that
            is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        threads: int | None = None,
        batch_size: int = 32,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        verify: bool = True,
        warm: bool = True,
        spinning: bool = True,
    ) -> None:
        for name, value in (("threads", threads), ("batch_size", batch_size)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"`{name}` must be a whole number above 0, got {value!r}. To resolve, correct it.")
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if verify:
            verify_files(self.folder, self.manifest)
        self.kind: str = self.manifest["kind"]
        self.labels: list[str] = self.manifest["labels"]
        self.batch_size = batch_size
        self._texts_per_row: int | None = self.manifest["texts_per_row"]
        self.inputs: dict[str, int] = self.manifest["inputs"]  # name -> what a batch is padded with
        self._tokenizer = Tokenizer.from_file(str(self.folder / self.manifest["tokenizer"]))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(
            self.manifest["max_length"], strategy="longest_first", direction=self.manifest["truncation_side"]
        )
        self._graph = open_graph(
            self.folder / self.manifest["model"],
            self.manifest.get("engine", "onnx"),
            self.manifest.get("setting", {}).get("precision", "fp32"),
            threads,
            providers,
            spinning,
        )
        if warm:
            self.logits(["a"] if self._texts_per_row != 2 else [("a", "a")])

    def __call__(self, texts: Text | Sequence[Text]) -> Any:
        """The answer to a text or a pair, or a list of answers to a list of them.

        One label: {"label": name, "score": its probability}. Several labels: {"labels": [those above 0.5], "scores": {name: probability}}.
        Regression: {"score": number}.
        """
        if isinstance(texts, str | tuple):
            return self._answers(self.probabilities([texts]))[0]
        return self._answers(self.probabilities(texts))

    def probabilities(self, texts: Sequence[Text]) -> np.ndarray:
        """Softmax for one label, sigmoid for several, the scores themselves for a regression: (texts, labels) float32."""
        logits = self.logits(texts)
        if self.kind == "regression":
            return logits
        if self.kind == "multi_label":
            return 0.5 * (1 + np.tanh(0.5 * logits))  # the sigmoid, without overflow
        exp = np.exp(logits - logits.max(axis=1, keepdims=True))
        return exp / exp.sum(axis=1, keepdims=True)

    def logits(self, texts: Sequence[Text]) -> np.ndarray:
        """The model's output in the order of the texts: (texts, labels) float32.

        Raises:
            TypeError: not a list of str or of pairs of str.
            ValueError: a pair where the model reads single texts, or the other way round; text that UTF-8 cannot say.
        """
        rows = self._checked(texts)
        if not rows:
            return np.zeros((0, max(1, len(self.labels))), dtype=np.float32)
        encodings = self._tokenizer.encode_batch(rows)
        order = sorted(range(len(rows)), key=lambda i: len(encodings[i].ids))
        parts = [
            self.infer(self._batch([encodings[i] for i in order[start : start + self.batch_size]]))
            for start in range(0, len(order), self.batch_size)
        ]
        found = np.concatenate(parts).astype(np.float32, copy=False)
        logits = np.empty_like(found)
        logits[order] = found
        return logits

    def infer(self, batch: dict[str, np.ndarray]) -> np.ndarray:
        """The model alone: inputs by the manifest's names, each (batch, length) int64, to logits (batch, labels)."""
        return self._graph(batch)

    def _batch(self, encodings: list[Any]) -> dict[str, np.ndarray]:
        """Model inputs, each (batch, longest) int64."""
        longest = max(1, *(len(e.ids) for e in encodings))
        batch = {}
        for name, filler in self.inputs.items():
            array = np.full((len(encodings), longest), filler, dtype=np.int64)
            for row, encoding in zip(array, encodings, strict=True):
                values = getattr(encoding, FIELDS[name])
                row[: len(values)] = values
            batch[name] = array
        return batch

    def _checked(self, texts: Any) -> list[Any]:
        if isinstance(texts, str | bytes) or not isinstance(texts, Sequence | np.ndarray):
            raise TypeError(f"`texts` must be a list of texts, got {type(texts).__name__}. To resolve, pass [text].")
        rows: list[Any] = []
        for number, text in enumerate(texts):
            pair = isinstance(text, tuple | list)
            for part in text if pair else (text,):
                if not isinstance(part, str):
                    raise TypeError(
                        f"text {number} must be a str, or a pair of them, got {type(part).__name__}. "
                        f"To resolve, {'decode it' if isinstance(part, bytes) else 'convert it'}."
                    )
                try:
                    part.encode("utf-8")
                except UnicodeEncodeError as error:
                    raise ValueError(
                        f"text {number} holds {part[error.start]!r}, which UTF-8 cannot say. "
                        'To resolve, decode the bytes with their true encoding, or with errors="replace".'
                    ) from None
            given = len(text) if pair else 1
            wanted = self._texts_per_row or (2 if pair else 1)
            if given != wanted:
                raise ValueError(
                    f"text {number} must be {'a pair of texts' if wanted == 2 else 'one text'}, as the model was trained, got {given}. "
                    f"To resolve, pass {'(first, second)' if wanted == 2 else 'a str'}."
                )
            rows.append(tuple(text) if pair else text)
        return rows

    def _answers(self, probabilities: np.ndarray) -> list[dict[str, Any]]:
        if self.kind == "regression":
            return [{"score": float(row[0])} for row in probabilities]
        if self.kind == "multi_label":
            return [
                {
                    "labels": [name for name, p in zip(self.labels, row, strict=True) if p > 0.5],
                    "scores": {name: float(p) for name, p in zip(self.labels, row, strict=True)},
                }
                for row in probabilities
            ]
        best = probabilities.argmax(axis=1)
        return [{"label": self.labels[i], "score": float(row[i])} for i, row in zip(best, probabilities, strict=True)]


def open_graph(
    file: Path,
    engine: str = "onnx",
    precision: str = "fp32",
    threads: int | None = None,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    spinning: bool = True,
) -> Graph:
    """An ONNX file as a function, which threads may share.

    Args:
        file: the graph.
        engine: "onnx" for onnxruntime, or "openvino".
        precision: what openvino computes in; onnxruntime reads it off the graph.
        threads: CPU threads of one answer; None: all physical cores.
        providers: onnxruntime only.
        spinning: onnxruntime only: its threads wait for work in a loop, which is fast, and takes the cores from whoever else needs them.

    Raises:
        ValueError: an unknown engine, or one that is not installed.
    """
    try:
        if engine == "onnx":
            return _onnxruntime_graph(file, threads, providers, spinning)
        if engine == "openvino":
            return _openvino_graph(file, precision, threads)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"the model was exported for {error.name}, which is not installed. To resolve, pip install {error.name}, or "
            "export it for another engine."
        ) from None
    raise ValueError(f"the engine must be onnx or openvino, got {engine!r}. To resolve, export anew with this version.")


def _onnxruntime_graph(file: Path, threads: int | None, providers: Sequence[str], spinning: bool) -> Graph:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
    # Where a CPU has AVX2 and no VNNI, sums of two products of signed 8-bit weights are cut off at 16 bits. This says: none of that.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if threads is not None:
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(file), options, providers=list(providers))
    return lambda batch: session.run(None, batch)[0]


def _openvino_graph(file: Path, precision: str, threads: int | None) -> Graph:
    import openvino

    # Unless it is told otherwise, it computes an fp32 graph in bf16 wherever the CPU can.
    config: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", "NUM_STREAMS": 1}
    if precision == "int8":  # its default for weights in int8, said so that it stays: one range for 32 activations
        config["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 32
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    model = openvino.Core().compile_model(str(file), "CPU", config)
    own = threading.local()  # a request is busy until it has answered

    def run(batch: dict[str, np.ndarray]) -> np.ndarray:
        if not hasattr(own, "request"):
            own.request = model.create_infer_request()
        return own.request.infer(batch)[0]

    return run


FIELDS = {"input_ids": "ids", "attention_mask": "attention_mask", "token_type_ids": "type_ids"}
KEYS = (
    "format", "files", "model", "tokenizer", "inputs", "kind", "labels", "texts_per_row", "max_length", "truncation_side",
)  # fmt: skip


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an exported folder, checked.

    Raises:
        ValueError: there is none, or it is damaged or of another format.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise ValueError(
            f"{folder} must hold a {MANIFEST}, without which nobody knows what its model reads and answers, and has none. "
            "To resolve, make the folder with `smbert export`."
        )
    try:
        manifest = dict(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} must be JSON, but reading it gave {error!r}. To resolve, export anew.") from error
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{file} must be of format {FORMAT}, got {manifest.get('format')!r}. To resolve, export anew with this version."
        )
    if missing := [key for key in KEYS if key not in manifest]:
        raise ValueError(f"{file} must say {', '.join(missing)}, and does not. To resolve, export anew.")
    return manifest


def verify_files(folder: Path, manifest: dict[str, Any]) -> None:
    """ValueError unless every file that the manifest names is there, and is the one that was exported."""
    needed = {manifest["model"], manifest["tokenizer"]}
    if unnamed := sorted(needed - set(manifest["files"])):
        raise ValueError(f"{folder / MANIFEST} must give the hash of {', '.join(unnamed)}. To resolve, export anew.")
    for name, digest in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise ValueError(
                f"{folder} must hold {name}, and does not. To resolve, copy the whole folder, or export anew."
            )
        if sha256(file) != digest:
            raise ValueError(
                f"{file} is not the file that was exported: its sha256 differs from the manifest's, so it is damaged or was changed. "
                "To resolve, copy the folder again, or export anew."
            )


def sha256(file: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    classifier, given = Classifier(Path(__file__).parent), sys.argv[1:]
    if classifier.manifest["texts_per_row"] == 2:
        if len(given) % 2:
            sys.exit(f"texts come in pairs, got {len(given)}. To resolve, pass two for each answer.")
        answers = classifier(list(zip(given[::2], given[1::2])))
    else:
        answers = classifier(given)
    for answer in answers:
        print(json.dumps(answer, ensure_ascii=False))
