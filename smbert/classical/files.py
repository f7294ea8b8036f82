"""A student on disk: a folder that is whole or untouched, without pickle, and checked before anything of it is used."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import skops.io
from sklearn.ensemble import RandomForestClassifier
from sklearn.pipeline import Pipeline
from sklearn.tree import DecisionTreeClassifier

from ..checkpoints import put_in_place
from .features import PairFeatures, count_vectorizers

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1
ABOUT, PIPELINE, VOCABULARY = "student.json", "pipeline.skops", "vocabulary.json"
# Beyond what skops trusts by itself. Trees are on its list of doubts because their node numbers are followed without a
# check: `_check_tree` is that check.
_TRUSTED = ("sklearn.tree._tree.Tree", f"{PairFeatures.__module__}.{PairFeatures.__qualname__}")


def write_student(folder: str | Path, about: dict[str, Any], write: Callable[[Path], None]) -> None:
    """Writes a student's folder, so that it is either as it was or complete.

    Args:
        folder: made if need be; an earlier student in it is replaced.
        about: goes to student.json, with the sha256 of all other files.
        write: puts the other files into the folder that it is given.

    Raises:
        ValueError: `folder` is a file, or holds something else than a student.
        OSError: it could not be written; its previous contents are intact.
    """
    folder = Path(os.path.abspath(folder))
    check_free(folder)
    partial = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        write(partial)
        files = {str(f.relative_to(partial)): _sha256(f) for f in sorted(partial.rglob("*")) if f.is_file()}
        described = {"schema_version": SCHEMA_VERSION, "scikit_learn": sklearn.__version__, **about, "files": files}
        # A grid of numpy's numbers leaves such among the parameters.
        text = json.dumps(described, indent=1, ensure_ascii=False, default=lambda number: number.item())
        (partial / ABOUT).write_text(text, encoding="utf-8")
        put_in_place(partial, folder)
    except OSError as error:
        raise OSError(
            f"could not save the student to {folder}: {error}. Its previous contents are intact. "
            "To resolve, free disk space or choose a writable folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(folder: Path) -> None:
    """ValueError where something else than a student lies."""
    if folder.exists() and not (folder.is_dir() and ((folder / ABOUT).is_file() or not any(folder.iterdir()))):
        raise ValueError(
            f"`folder` must be new, empty or an earlier student, got {folder}. To resolve, choose another name."
        )


def read_about(folder: str | Path) -> dict[str, Any]:
    """student.json, after every file that it names was compared with its sha256.

    Raises:
        ValueError: no student, one of another schema, or a file that is missing or not what was written.
    """
    folder = Path(folder)
    file = folder / ABOUT
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
        version = about["schema_version"]
        files = dict(about["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder} must hold a student ({ABOUT} and the files that it names), but reading it gave {error!r}. "
            "To resolve, check the name, or save the student again."
        ) from error
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"`schema_version` of {file} must be {SCHEMA_VERSION}, got {version!r}. "
            "To resolve, load it with the smbert version that wrote it, or make it again."
        )
    for name, digest in files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"{file} must name files of its own folder, got {name!r}. To resolve, do not use it.")
        if not path.is_file() or _sha256(path) != digest:
            raise ValueError(
                f"{path} must be the file that was saved, but it is {'changed' if path.is_file() else 'missing'}. "
                "To resolve, copy or make the student again."
            )
    return about


def write_pipeline(folder: Path, pipeline: Pipeline) -> None:
    """pipeline.skops, and vocabulary.json with the n-grams of each vectorizer in the order of their columns.

    The vocabularies stay out of the skops file, where an entry costs hundreds of bytes.
    """
    pipeline = copy.deepcopy(pipeline)
    lists = []
    for one in count_vectorizers(pipeline[0]):
        lists.append(sorted(one.vocabulary_, key=one.vocabulary_.__getitem__))
        one.vocabulary_ = {}
    (folder / VOCABULARY).write_text(json.dumps(lists), encoding="utf-8")
    (folder / PIPELINE).write_bytes(skops.io.dumps(pipeline, compression=zipfile.ZIP_DEFLATED))


def read_pipeline(folder: Path, saved_with: str) -> Pipeline:
    """The pipeline that `write_pipeline` saved. Types outside a fixed list are refused before any is built.

    Raises:
        ValueError: no skops file, one with types that a student does not have, or contents that do not fit together.
    """
    if saved_with != sklearn.__version__:
        logger.warning("the student was saved with scikit-learn %s, this is %s", saved_with, sklearn.__version__)
    file = folder / PIPELINE
    try:
        strange = sorted(set(skops.io.get_untrusted_types(file=file)) - set(_TRUSTED))
        if not strange:
            pipeline = skops.io.load(file, trusted=list(_TRUSTED))
            lists = json.loads((folder / VOCABULARY).read_text(encoding="utf-8"))
            _check_pipeline(pipeline, lists)
    except Exception as error:  # skops passes on whatever a damaged archive makes its readers raise
        raise ValueError(
            f"{file} must be a student's pipeline, but loading it gave {error!r}. To resolve, make the student again."
        ) from error
    if strange:
        raise ValueError(
            f"{file} must hold nothing but scikit-learn's and smbert's own types, got {', '.join(strange)}. "
            "Nothing of it was run. To resolve, do not use this file."
        )
    return pipeline


def _check_pipeline(pipeline: Any, lists: list[list[str]]) -> None:
    """Gives the vectorizers their vocabularies back, and refuses trees whose nodes point nowhere."""
    if not isinstance(pipeline, Pipeline) or len(pipeline) != 2:
        raise ValueError("it is no pipeline of features and a student")
    parts = list(count_vectorizers(pipeline[0]))
    if len(parts) != len(lists):
        raise ValueError(f"{len(parts)} vectorizers have {len(lists)} vocabularies")
    for part, terms in zip(parts, lists):
        if not terms or not all(isinstance(term, str) for term in terms):
            raise ValueError("a vocabulary is no list of texts")
        part.vocabulary_ = {term: number for number, term in enumerate(terms)}
    estimator = pipeline[1]
    trees = estimator.estimators_ if isinstance(estimator, RandomForestClassifier) else [estimator]
    for tree in trees:
        if isinstance(tree, DecisionTreeClassifier):
            _check_tree(tree)


def _check_tree(tree: DecisionTreeClassifier) -> None:
    """Children come after their parents and exist, features exist: so that following them ends, within the arrays."""
    nodes = tree.tree_
    left, right, feature = nodes.children_left, nodes.children_right, nodes.feature
    number = np.arange(nodes.node_count)
    leaf = left == -1
    inner = ~leaf
    sound = np.array_equal(leaf, right == -1) and nodes.n_features == tree.n_features_in_
    for children in (left, right):
        sound = sound and bool(((children > number) & (children < nodes.node_count))[inner].all())
    if not sound or not ((feature >= 0) & (feature < nodes.n_features))[inner].all():
        raise ValueError("a tree has nodes that point outside it")


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
