"""SmBERT: compress BERT-family encoders, measure what that costs, report it honestly.

Importing smbert registers its model types with transformers' Auto classes.
"""

__version__ = "0.1.0"

from importlib.util import find_spec

# Where there is no torch, smbert.runtime still works.
if find_spec("torch") is not None:
    from .checkpoints import load_model, save_model
    from .classical import distill_classical, load_student
    from .compress import CompressionResult, compress
    from .family import Family, compress_family
    from .importance import SCORERS
    from .modeling import FAMILIES
    from .objectives import OBJECTIVES
    from .recipe import Recipe
    from .report import Report
    from .stages import (
        STAGES,
        DepthReduction,
        Distill,
        EmbeddingFactorisation,
        Finetune,
        RetrainingFreePruning,
        VocabPruning,
        WidthPruning,
    )
    from .surgery import PruningPlan, keep_layers, keep_units, structure_of
    from .tasks import GLUE, Task

__all__ = [
    "FAMILIES",
    "GLUE",
    "OBJECTIVES",
    "SCORERS",
    "STAGES",
    "CompressionResult",
    "DepthReduction",
    "Distill",
    "EmbeddingFactorisation",
    "Family",
    "Finetune",
    "PruningPlan",
    "Recipe",
    "Report",
    "RetrainingFreePruning",
    "Task",
    "VocabPruning",
    "WidthPruning",
    "compress",
    "compress_family",
    "distill_classical",
    "keep_layers",
    "keep_units",
    "load_model",
    "load_student",
    "save_model",
    "structure_of",
]
