"""The stages that a recipe chains. A stage is its configuration: a frozen dataclass, the same in Python and in YAML.

`stage.outline(outline, context)` says what would come out, from the sizes alone, and raises ValueError where the stage cannot work;
`stage.run(model, context, workdir)` does it. A model goes in, another comes out, and the one that came in is left alone.

A new stage is a dataclass in a file of its own and an entry of `STAGES`.
"""

from .base import Outline, Stage, TrainingStage, build
from .depth import DepthReduction
from .distill import Distill
from .embedding import EmbeddingFactorisation
from .finetune import Finetune
from .retraining_free import RetrainingFreePruning
from .vocab import VocabPruning
from .width import WidthPruning

STAGES: dict[str, type[Stage]] = {
    cls.kind: cls
    for cls in (
        Finetune,
        DepthReduction,
        Distill,
        WidthPruning,
        RetrainingFreePruning,
        VocabPruning,
        EmbeddingFactorisation,
    )
}

__all__ = [
    "STAGES",
    "DepthReduction",
    "Distill",
    "EmbeddingFactorisation",
    "Finetune",
    "Outline",
    "RetrainingFreePruning",
    "Stage",
    "TrainingStage",
    "VocabPruning",
    "WidthPruning",
    "build",
]
