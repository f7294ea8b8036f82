"""Structured pruning without retraining and without gold labels: minutes, not epochs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedModel

from .._sizes import Size, parse
from ..context import Context, on_device
from ..importance import sum_over_ranks
from ..measure import max_positions
from ..processes import process_state
from ..retraining_free.calibration import SOFT, CalibrationLoss
from ..retraining_free.cost_table import CostTable, counted_costs
from ..retraining_free.database import FILE, Database, Settings, build_database, check_folder
from ..retraining_free.empty_parts import without_empty_parts
from ..retraining_free.kprune import check_linear, prune_by_knowledge
from ..retraining_free.latency_table import Conditions, check_table, latency_table, whole_models_ms
from ..retraining_free.masksearch import prune_by_fisher
from ..retraining_free.obs import prune_by_obs
from ..retraining_free.search import check_reachable, options_of
from ..retraining_free.stream import Calls, record
from ..surgery import pass_by, structure_of
from ..teacher import LABELS, dataset_fingerprint, join_unlabelled, model_fingerprint, token_counts
from .base import Outline, Stage, as_text, batches_of_rank, known_task

logger = logging.getLogger(__name__)

Result = tuple[PreTrainedModel, CostTable, float, dict[str, Any]]  # pruned, costs, budget, what is worth recording

# Tokens: of rows that are shorter, more than `batch_size` come at once, or small products would slow all down.
SHORT = 64
METHODS = ("obs", "fisher", "kprune")
TIMED = ("speedup", "latency_ms")
BUDGETS = (*TIMED, "macs", "params")


@dataclass(frozen=True, kw_only=True)
class RetrainingFreePruning(Stage):
    """Structured pruning of heads and neurons to a budget, with new weights for what stays; no training, no gold labels.

    Papers: ZipLM (Kurtic et al. 2023), Kwon et al. (2022), K-prune (Park et al. 2024). Whole sub-layers may vanish; in
    BERT-like families and MPNet their norms go with them (`retraining_free/empty_parts.py`).

    Attributes:
        method: "obs": optimal brain surgery, a database of all sizes, and a search for the best of them. "fisher": mask search by
            Fisher information and rescaling. "kprune": scores and fits from bottom to top; for `macs` and `params` only.
        speedup: budget as a factor of measured latency, such as 2.
        latency_ms: budget in milliseconds for a batch of `shape`.
        macs: budget of multiply-accumulates of the encoder, a number or a share of what comes in ("50%").
        params: budget of all parameters, likewise.
        shape: batch x tokens at which time is measured.
        samples: training rows that are looked at, and texts of the pool where the task has fewer; their labels are not.
        tokens: rows are taken only until they hold this many, since it is tokens that the weights are fitted on.
        batch_size: rows of one batch, more where they have fewer than 64 tokens; the result does not depend on it.
        calibration: so many of these rows judge by the divergence from the model's own answers, softened, and are not fitted themselves:
            one half leads the search for sizes, the other judges what it found, and, by hidden states, the fit (obs, like the next four).
        search_steps: sizes that are tried beside those that the measured effect of each sub-layer suggests; a sixth more, at most
            twice, where what they really take asks for others.
        ffn_levels: FFN sizes are multiples of 1 / ffn_levels of the widest layer.
        damping: added to the diagonal of second moments, as a share of its mean.
        database: folder of the database of sizes, made there if there is none; by default in the run's cache.
        multiple_of: FFN sizes are multiples of it, since odd sizes cost speed.
        fit_damping: as `damping`, for the fits from bottom to top (obs, kprune); null leaves out that of obs.
        latency_table: file of the latency table, by default in the run's cache.
        force_table: use a table that was measured on another machine or with another engine.
        threads: CPU threads for which time is measured; by default those in use.
        engine: that time is measured with: torch (the default), onnx (ONNX Runtime) or openvino, in fp32.
        task: an intermediate task's name whose rows are looked at.
    """

    kind: ClassVar[str] = "retraining_free"
    method: str = "obs"
    speedup: float | None = None
    latency_ms: float | None = None
    macs: Size | None = None
    params: Size | None = None
    shape: str = "32x128"
    samples: int = 2048
    tokens: int | None = None
    batch_size: int = 32
    calibration: int = 256
    search_steps: int = 90
    ffn_levels: int = 16
    damping: float = 1e-4
    database: str | None = None
    multiple_of: int = 8
    fit_damping: float | None = 1e-2
    latency_table: str | None = None
    force_table: bool = False
    threads: int | None = None
    engine: str | None = None
    task: str | None = None

    def __post_init__(self) -> None:
        for name in ("macs", "params", "database", "latency_table"):
            object.__setattr__(self, name, as_text(getattr(self, name)))
        if self.method not in METHODS:
            raise ValueError(
                f"`method` must be one of {', '.join(METHODS)}, got {self.method!r}. To resolve, choose one."
            )
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"exactly one of {', '.join(BUDGETS)} must be given, got {', '.join(given) or 'none'}. To resolve, keep one."
            )
        for name, least in (("speedup", 1), ("latency_ms", 0)):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (number and least < value < math.inf):
                raise ValueError(f"`{name}` must be a number above {least}, got {value!r}. To resolve, correct it.")
        for name in ("macs", "params"):
            if getattr(self, name) is not None:
                parse(getattr(self, name), name)
        counts = (
            "samples",
            "tokens",
            "batch_size",
            "calibration",
            "search_steps",
            "ffn_levels",
            "multiple_of",
            "threads",
        )
        for name, least in ((name, int(name != "search_steps")) for name in counts):
            value = getattr(self, name)
            optional = value is None and name in ("tokens", "threads")
            if not optional and (isinstance(value, bool) or not isinstance(value, int) or value < least):
                raise ValueError(
                    f"`{name}` must be an integer of at least {least}, got {value!r}. To resolve, correct it."
                )
        if self.method == "kprune" and (self.speedup is not None or self.latency_ms is not None):
            check_linear(CostTable("latency_ms", 0, {}, {}))
        if self.method == "kprune" and self.fit_damping is None:
            raise ValueError(
                "`fit_damping` must be a number for kprune, which is its fits, got null. To resolve, try 1.0e-2."
            )
        if self.calibration >= self.samples:
            raise ValueError(
                f"`calibration` must be below `samples` = {self.samples}, got {self.calibration}. To resolve, lower it."
            )
        for name in ("damping", "fit_damping"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value < math.inf) and (name, value) != ("fit_damping", None):
                hint = " (YAML takes 1e-2 for text and 1.0e-2 for a number)" if isinstance(value, str) else ""
                raise ValueError(
                    f"`{name}` must be a number above 0, got {value!r}{hint}. To resolve, try {1e-4 if name == 'damping' else 1e-2}."
                )
        self._settings()
        self._conditions()

    def _settings(self) -> Settings:
        return Settings(self.ffn_levels, self.multiple_of, self.damping)

    def _conditions(self) -> Conditions:
        batch, _, length = self.shape.partition("x")
        if not (batch.isdigit() and length.isdigit()):
            raise ValueError(f'`shape` must look like "32x128", got {self.shape!r}. To resolve, correct it.')
        return Conditions(int(batch), int(length), self.threads, self.engine or "torch")

    @property
    def timed(self) -> bool:
        """Whether the budget is one of time."""
        return self.macs is None and self.params is None

    @property
    def table_file(self) -> Path | None:
        """The latency table of a single model that is named; None for the cache and for a folder, which take those of many."""
        return Path(self.latency_table) if self.latency_table and self.latency_table.endswith(".json") else None

    def outline(self, before: Outline, context: Context) -> Outline:
        known_task(self.task, context)
        if self.timed:
            self._check_timing(context.teacher)
        if self.database is not None and self.method == "obs":
            check_folder(Path(self.database), self._settings())
        # The budget decides on sizes that the run alone knows.
        return replace(before, heads_known=False)

    def _check_timing(self, teacher: PreTrainedModel | None) -> None:
        length = self._conditions().length
        if teacher is not None and length > (most := max_positions(teacher)):
            raise ValueError(
                f"`shape` must have at most {most} tokens, the positions of this model, got {self.shape!r}. To resolve, lower it."
            )
        if self.table_file is not None and self.table_file.exists():
            check_table(self.table_file, self._conditions(), self.force_table)

    def run(self, model: PreTrainedModel, context: Context, workdir: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        start = time.perf_counter()
        model = on_device(model)
        rows = self._rows(context)
        pruned, table, limit, info = getattr(self, f"_{self.method}")(model, rows, context)
        last = rows.select(range(len(rows) - self._judges(rows), len(rows)))  # none of those that judged
        pruned = without_empty_parts(pruned, self._batches(last, context), sum_over_ranks)
        info = {
            "sampled_rows": len(rows),
            "pruning_seconds": round(time.perf_counter() - start, 1),
            "budget": {"name": table.name, "asked": limit, "reached": info.pop("cost")},
            "passed_by": [list(pair) for pair in structure_of(pruned).passed_by],
            **info,
        }
        pace = info.pop("pace", 1.0)
        if self.timed:
            told = self._alone(lambda: self._measured(model, pruned, table, context.teacher))
            if told is not None:
                info["latency_ms"] = {**told, "predicted": told["predicted"] * pace, "pace": pace}
        return pruned, info

    def _obs(self, model: PreTrainedModel, rows: Dataset, context: Context) -> Result:
        sizes = self._settings().sizes(structure_of(model).layer_widths)
        table = self._table(
            model, {n for own in sizes[::2] for n in own}, {n for own in sizes[1::2] for n in own}, context
        )
        limit = self._limit(table, model)
        # The database takes minutes and says nothing about costs.
        check_reachable(options_of([(own, [0.0] * len(own)) for own in sizes], table), table, limit)
        start = time.perf_counter()
        # On the rows that were fitted, a fit that has learned their noise would look best; on those that have led the search, what it found.
        judged = self._judges(rows)
        half, rest = (judged + 1) // 2, rows.select(range(judged, len(rows)))
        leading, judging = rows.select(range(half)), rows.select(range(judged - half, judged))
        calls = record(model, self._batches(rest, context), self._autocast(context), answers=False)
        loss, coarse = (
            CalibrationLoss(
                model,
                self._batches(r, context),
                self._autocast(context),
                sum_over_ranks,
                keep=r is leading,
                temperature=SOFT,
            )
            for r in (judging, leading)
        )
        database = self._database(model, calls, rest, context)
        made = time.perf_counter()
        pruned, info = prune_by_obs(
            model, calls, database, table, limit, loss, coarse,
            steps=self.search_steps, seed=context.seed, damping=self.fit_damping, reduce=sum_over_ranks,
            pace=(lambda cut: self._pace(model, pass_by(cut), table)) if self.timed else None,
        )  # fmt: skip
        told = {"sampled_tokens": database.about["tokens"], "database_seconds": round(made - start, 1)}
        return pruned, table, limit, {**told, **info}

    def _judges(self, rows: Dataset) -> int:
        return min(self.calibration, max(1, len(rows) // 2))

    def _fisher(self, model: PreTrainedModel, rows: Dataset, context: Context) -> Result:
        batches = self._batches(rows, context)
        table = self._even_table(model, context)
        limit, autocast = self._limit(table, model), self._autocast(context)
        calls = record(model, batches, answers=False)
        pruned, info = prune_by_fisher(model, calls, batches, table, limit, autocast=autocast, reduce=sum_over_ranks)
        return pruned, table, limit, info

    def _kprune(self, model: PreTrainedModel, rows: Dataset, context: Context) -> Result:
        batches = self._batches(rows, context)
        table = self._even_table(model, context)
        limit, calls = self._limit(table, model), record(model, batches, answers=False)
        assert self.fit_damping is not None  # checked above
        pruned, info = prune_by_knowledge(
            model, calls, batches, table, limit,
            multiple_of=self.multiple_of, damping=self.fit_damping, autocast=self._autocast(context), reduce=sum_over_ranks,
        )  # fmt: skip
        return pruned, table, limit, info

    def _batches(self, rows: Dataset, context: Context) -> list[dict[str, torch.Tensor]]:
        return batches_of_rank(rows, context, self.batch_size, tokens=SHORT * self.batch_size)

    def _autocast(self, context: Context) -> torch.dtype | None:
        """Of what ranks, and of what obs records; moments and least squares are float32 and float64 all the same."""
        return torch.bfloat16 if context.bf16 else None

    def _rows(self, context: Context) -> Dataset:
        """The task's own first, so that they judge."""
        data = context.data_for(self.task)
        rows = data.train.shuffle(seed=context.seed)
        if context.pool is not None and self.looks_at_pool(context):
            few = min(self.samples - len(rows), len(context.pool))
            rows = join_unlabelled(rows, context.pool.shuffle(seed=context.seed).select(range(few)), data.task)
        rows = rows.select(range(min(self.samples, len(rows))))
        rows = rows.select_columns([name for name in rows.column_names if name not in LABELS])
        wanted = self.samples
        if self.tokens is not None:
            wanted = min(wanted, 1 + int(np.searchsorted(token_counts(rows).cumsum(), self.tokens)))
        if wanted > len(rows):
            logger.warning("%s has %d rows, fewer than `samples` = %d", data.task.name, len(rows), self.samples)
        return rows.select(range(min(wanted, len(rows))))

    def looks_at_pool(self, context: Context) -> bool:
        return len(context.data_for(self.task).train) < self.samples

    def _database(self, model: PreTrainedModel, calls: Calls, rows: Dataset, context: Context) -> Database:
        data = dataset_fingerprint(rows)
        settings = self._settings()
        # What is captured under autocast is another calibration.
        precision = [] if calls.autocast is None else [str(calls.autocast)]
        key = json.dumps([model_fingerprint(model), data, asdict(settings), *precision])
        name = f"database-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
        folder = context.cache_dir / name if self.database is None else Path(self.database)
        there = (folder / FILE).is_file()
        process_state().wait_for_everyone()  # nobody looks after the main process has begun to build
        if there:
            return Database.load(folder, model, data, settings)
        return build_database(model, calls, folder, data, settings, sum_over_ranks)

    def _even_table(self, model: PreTrainedModel, context: Context) -> CostTable:
        """Costs of all numbers of heads and all allowed numbers of neurons; time is measured for a few of the latter only."""
        widths = structure_of(model).layer_widths
        heads, ffn = ({size for pair in widths for size in (0, pair[kind])} for kind in range(2))
        steps = self._settings().ffn_sizes(max(ffn), max(ffn)) if self.timed else range(0, max(ffn), self.multiple_of)
        return self._table(model, heads | set(range(max(heads))), ffn | set(steps), context)

    def _table(self, model: PreTrainedModel, heads: set[int], ffn: set[int], context: Context) -> CostTable:
        if not self.timed:
            return counted_costs(model, "params" if self.macs is None else "macs", heads, ffn)
        place = context.cache_dir if self.latency_table is None else Path(self.latency_table)
        return latency_table(model, heads, ffn, self._conditions(), place, force=self.force_table)

    def _limit(self, table: CostTable, model: PreTrainedModel) -> float:
        """The budget in the table's unit."""
        now = table.total(structure_of(model).layer_widths)
        if self.speedup is not None:
            return now / self.speedup
        if self.latency_ms is not None:
            return self.latency_ms
        asked: Any = self.macs if self.macs is not None else self.params
        number = parse(asked, table.name)
        return number if isinstance(number, int) else math.floor(number * int(now))

    def _pace(self, model: PreTrainedModel, pruned: PreTrainedModel, table: CostTable) -> float:
        """How many times as long as the table says a pruned model takes: in a row its sub-layers need not take what each takes alone."""
        told = self._alone(lambda: self._measured(model, pruned, table, seconds=8, runs=8))
        ratio = 0.0 if told is None else told["measured"] / told["predicted"]
        return float(sum_over_ranks(torch.tensor([ratio], dtype=torch.float64))[0])

    def _alone(self, measure: Callable[[], dict[str, float]]) -> dict[str, float] | None:
        """What the main process measures while the others wait, since processes that measure at once slow each other down."""
        try:
            return measure() if process_state().is_main_process else None
        finally:
            process_state().wait_for_everyone()

    def _measured(
        self,
        model: PreTrainedModel,
        pruned: PreTrainedModel,
        table: CostTable,
        teacher: PreTrainedModel | None = None,
        seconds: float = 20,
        runs: int = 20,
    ) -> dict[str, float]:
        """Predicted and measured milliseconds of the result, with what came in, and the teacher, timed in the same turns.

        For a factor the prediction is the table's share of what came in as timed in these turns: the table may be of another pace.
        """
        models = {"before": model, "after": pruned}
        if teacher is not None:
            models["teacher"] = on_device(teacher)
        ms = whole_models_ms(models, self._conditions(), min_runs=runs, min_seconds=seconds)
        predicted, base = (table.total(structure_of(m).layer_widths) for m in (pruned, model))
        return {
            "predicted": predicted if self.speedup is None else ms["before"] * predicted / base,
            "measured": ms["after"],
            "before": ms["before"],
            "speedup": ms["before"] / ms["after"],
            **({"teacher_speedup": ms["teacher"] / ms["after"]} if "teacher" in ms else {}),
        }
