"""Embedding factorisation: the product is the best one, the model reloads with and without smbert, and goes on through other surgery."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import batch, tiny

from smbert._surgery_embedding import factorise_embedding
from smbert._surgery_vocab import keep_vocabulary
from smbert.context import Context
from smbert.measure import count_parameters, macs
from smbert.modeling import FAMILIES
from smbert.recipe import Recipe
from smbert.runner import Runner, run_recipe
from smbert.stages import Distill, Outline
from smbert.stages.embedding import EmbeddingFactorisation, low_rank
from smbert.surgery import PruningPlan, keep_layers, keep_units, load_model, save_model, structure_of


def of_rank(model: Any, rank: int) -> Any:
    """The model with a table of that rank, in place."""
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        table, basis, _ = low_rank(weight, np.ones(len(weight)), rank)
        weight.copy_(table @ basis.T)
    return model


def factorised(model: Any, rank: int) -> Any:
    weight = model.get_input_embeddings().weight
    return factorise_embedding(model, *low_rank(weight, np.ones(len(weight)), rank)[:2])


def logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_table_of_that_rank_loses_nothing(family: str, tmp_path: Path) -> None:
    model = of_rank(tiny(family, layers=2), 6)
    inputs = batch(model)
    small = factorised(model, 6)
    assert torch.allclose(logits(small, inputs), logits(model, inputs), atol=1e-5)
    width = structure_of(model).embedding_size
    assert count_parameters(model).total - count_parameters(small).total == 100 * width - 6 * (100 + width)
    assert macs(small, 10) - macs(model, 10) == 10 * 6 * width
    save_model(small, tmp_path / "small")
    again = load_model(tmp_path / "small")
    assert type(again) is type(small) and torch.equal(logits(again, inputs), logits(small, inputs))
    # Other surgery goes on from there.
    less = keep_layers(small, [0])
    assert less.config.embedding_rank == 6 and structure_of(less).embedding_size == 6
    units = keep_units(small, PruningPlan(heads=((0, 2), (1,)), ffn=((1, 5), (0,))))
    assert torch.equal(units.get_input_embeddings().weight, small.get_input_embeddings().weight)
    ids = sorted({*range(5), *inputs["input_ids"].flatten().tolist()})
    new = {old: i for i, old in enumerate(ids)}
    pruned = keep_vocabulary(small, ids)
    moved = {**inputs, "input_ids": inputs["input_ids"].clone().apply_(new.get)}
    assert torch.allclose(logits(pruned, moved), logits(small, inputs), atol=1e-6)


def test_frequent_pieces_are_kept_best() -> None:
    torch.manual_seed(0)
    table = torch.randn(60, 16)
    counts = np.ones(60)
    counts[:10] = 1000
    left, right, lost = low_rank(table, counts, 8)
    error = (table - left @ right.T).square().sum(1)
    plain = (lambda a, b, _: (table - a @ b.T).square().sum(1))(*low_rank(table, np.ones(60), 8))
    assert error[:10].sum() < 0.3 * plain[:10].sum() and error.sum() > plain.sum()
    weights = torch.from_numpy(counts)
    assert lost == pytest.approx(float((weights * error).sum() / (weights * table.square().sum(1)).sum()), rel=1e-4)
    # As good as the textbook's SVD of the weighted table.
    u, s, v = torch.linalg.svd(weights.sqrt()[:, None] * table.double(), full_matrices=False)
    assert torch.allclose(
        left.double() @ right.double().T, (u[:, :8] * s[:8] @ v[:8]) / weights.sqrt()[:, None], atol=1e-4
    )


def test_the_stage_in_a_run(context: Context, tmp_path: Path) -> None:
    model = tiny("bert", layers=2)
    recipe = Recipe(stages=(EmbeddingFactorisation(rank="1/4"), Distill(max_steps=2, batch_size=8)), max_length=32)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    small, records = run_recipe(
        recipe, model, replace(context, teacher=tiny("bert", layers=2)), Runner(tmp_path / "out")
    )
    assert records[0]["rank"] == 8 and 0 < records[0]["lost_share"] < 1
    assert records[0]["parameters"]["after"] == sum(p.numel() for p in small.parameters())
    assert small.config.embedding_rank == 8
    first = load_model(tmp_path / "out/01-embedding_factorisation")
    assert not torch.equal(
        small.get_input_embeddings().projection.weight, first.get_input_embeddings().projection.weight
    )


def test_without_smbert(tmp_path: Path) -> None:
    model = factorised(tiny("bert", layers=1), 4)
    save_model(model, tmp_path / "small")
    inputs = batch(model)
    torch.save(inputs, tmp_path / "inputs.pt")
    code = (
        "import sys, torch; sys.modules['smbert'] = None\n"
        "from transformers import AutoModelForSequenceClassification as A\n"
        f"m = A.from_pretrained({str(tmp_path / 'small')!r}, trust_remote_code=True)\n"
        f"print(m(**torch.load({str(tmp_path / 'inputs.pt')!r})).logits.flatten().tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == pytest.approx(logits(model, inputs).flatten().tolist(), abs=1e-6)


@pytest.mark.parametrize("options", [{"rank": 0}, {"rank": "wide"}, {"smoothing": 0}, {"smoothing": float("nan")}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=f"`{next(iter(options))}`"):
        EmbeddingFactorisation(**options)


def test_what_cannot_be_factorised(context: Context) -> None:
    model = tiny("bert", layers=1)
    for rank in (32, 100):
        with pytest.raises(ValueError, match="`rank` must be"):
            EmbeddingFactorisation(rank=rank).outline(Outline(structure_of(model)), context)
    with pytest.raises(ValueError, match="factorised already"):
        factorised(factorised(model, 8), 4)
    stage = EmbeddingFactorisation(rank=4)
    with pytest.raises(ValueError, match=r"factorised already.*To resolve"):
        stage.outline(Outline(structure_of(factorised(model, 8))), context)
    before = Outline(structure_of(model))
    assert stage.outline(before, context).structure == structure_of(factorised(model, 4))
    with pytest.raises(ValueError, match="factorised already"):
        Recipe(stages=(stage, stage)).check(before, context)
    with pytest.raises(ValueError, match="no head shares it"):
        factorised(tiny("bert", "masked-lm", layers=1), 4)
    with pytest.raises(ValueError, match="`table` and `projection`"):
        factorise_embedding(model, torch.zeros(99, 4), torch.zeros(32, 4))
