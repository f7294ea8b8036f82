"""Task fine-tuning."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel

from ..context import Context, on_device
from ..heads import with_head
from ..objectives import GoldObjective, build_objectives
from ..surgery import structure_of
from ..trainer import Distillation
from .base import TrainingStage


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingStage):
    """Task fine-tuning of whatever comes in; a head for another label set is replaced by a fresh one."""

    kind: ClassVar[str] = "finetune"

    def run(self, model: PreTrainedModel, context: Context, workdir: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
        data = context.data_for(self.task)
        model = on_device(with_head(copy.deepcopy(model), data.task))
        structure = structure_of(model)
        objective = build_objectives([GoldObjective()], structure, structure, data.task.kind)
        info = self.train(Distillation(model, objective), self.rows(data.train, context), context, workdir, data)
        return model, info
