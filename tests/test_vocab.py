"""Vocabulary pruning: covered text is cut up and answered as before, by every kind of tokenizer and every family."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from run_helpers import QUIET
from tiny_models import batch, tiny
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from smbert._surgery_vocab import keep_vocabulary, token_ids_in_config
from smbert.compress import compress
from smbert.context import Context, TaskData
from smbert.inputs import tokenised
from smbert.modeling import FAMILIES
from smbert.recipe import Recipe
from smbert.runner import Runner, context_at_end, run_recipe
from smbert.stages import DepthReduction, Distill, Outline
from smbert.stages.vocab import VocabPruning
from smbert.surgery import PruningPlan, keep_units, load_model, save_model, structure_of
from smbert.tasks import Task, prepare
from smbert.teacher import freeze
from smbert.vocab import choose_pieces, count_pieces, kept_ids, prune_tokenizer, segmentation_change, with_pieces_of

SHARED = Path(__file__).resolve().parents[2] / "shared"
SPECIALS = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
NAMES = {"bos": "<s>", "pad": "<pad>", "eos": "</s>", "unk": "<unk>", "mask": "<mask>", "cls": "<s>", "sep": "</s>"}
TEXTS = [
    "the cat sat on the mat and the catalogue of cats was there",
    "a hat is a hat; 'that' cat hatches 12 plans in 2021!",
    "mats, mattresses and habits — unhappily unhabitable café über",
    "naïve façade 日本 🙂 don't won't it's",
]


def wrap(backend: Tokenizer, **kwargs: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=64, **{f"{k}_token": v for k, v in NAMES.items()}, **kwargs
    )


def trained(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of some hundred pieces, with RoBERTa's special tokens and its post-processor."""
    if kind == "BPE":
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        backend.decoder = decoders.ByteLevel()
        trainer: Any = trainers.BpeTrainer(
            vocab_size=420,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "Unigram":
        backend = Tokenizer(models.Unigram())
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
        backend.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=SPECIALS, unk_token="<unk>", show_progress=False
        )
    else:
        backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(vocab_size=160, special_tokens=SPECIALS, show_progress=False)
    backend.train_from_iterator(TEXTS * 8, trainer)
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=kind == "BPE")
    return wrap(backend, add_prefix_space=kind == "BPE")


def counts_of(tokenizer: Any, texts: list[str]) -> np.ndarray:
    return count_pieces([Dataset.from_dict({"input_ids": tokenizer(texts)["input_ids"]})], len(tokenizer))


def pruned(tokenizer: Any, texts: list[str], **limits: Any) -> tuple[list[int], PreTrainedTokenizerFast]:
    ids = choose_pieces(tokenizer, counts_of(tokenizer, texts), **limits)
    return ids, prune_tokenizer(tokenizer, ids)


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_covered_text_is_cut_up_as_before(kind: str, tmp_path: Path) -> None:
    tokenizer = trained(kind)
    ids, small = pruned(tokenizer, TEXTS[:2])
    assert len(ids) < len(tokenizer) == tokenizer.backend_tokenizer.get_vocab_size()
    assert segmentation_change(tokenizer, small, TEXTS[:2]) == {"texts_changed": 0.0, "mean_length_change": 0.0}
    small.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for arguments in ((TEXTS[:2],), (TEXTS[:2], TEXTS[1::-1])):
        long, short = tokenizer(*arguments), again(*arguments)
        assert [[ids[i] for i in row] for row in short["input_ids"]] == long["input_ids"]
        assert short.keys() == long.keys() and short["attention_mask"] == long["attention_mask"]
    assert kept_ids(tokenizer, again) == ids
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.model_max_length == 64 and again.model_input_names == tokenizer.model_input_names


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_dropped_pieces_are_spelt_by_shorter_ones(kind: str) -> None:
    tokenizer = trained(kind)
    _, small = pruned(tokenizer, ["a hat"])
    long, short = (t(TEXTS, add_special_tokens=False)["input_ids"] for t in (tokenizer, small))
    change = segmentation_change(tokenizer, small, TEXTS)
    assert 0 < change["texts_changed"] <= 1
    assert change["mean_length_change"] == pytest.approx(sum(map(len, short)) / sum(map(len, long)) - 1)
    # Nothing becomes unknown that was not: single characters and bytes always stay.
    assert [small.decode(row) for row in short] == [tokenizer.decode(row) for row in long]
    assert sum(row.count(small.unk_token_id) for row in short) == sum(row.count(tokenizer.unk_token_id) for row in long)


def test_a_bpe_piece_stays_with_all_that_it_is_merged_from() -> None:
    tokenizer = trained("BPE")
    ids, small = pruned(tokenizer, TEXTS)
    pieces = set(small.get_vocab())
    model = json.loads(small.backend_tokenizer.to_str())["model"]
    assert all({a, b, a + b} <= pieces for a, b in model["merges"])
    made = {a + b for a, b in model["merges"]}
    assert all(len(piece) == 1 or piece in made or piece in SPECIALS for piece in pieces)
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= pieces
    counts = counts_of(tokenizer, TEXTS)
    unseen = [i for i in ids if counts[i] == 0]
    assert any(len(tokenizer.convert_ids_to_tokens(i)) > 1 for i in unseen), "no piece is there for a merge alone"


@pytest.mark.parametrize("kind", ["WordPiece", "BPE", "Unigram"])
def test_limits(kind: str) -> None:
    tokenizer = trained(kind)
    counts = counts_of(tokenizer, TEXTS)
    least = len(choose_pieces(tokenizer, counts, coverage=1e-9))
    every = choose_pieces(tokenizer, counts)
    assert counts[every].sum() == counts.sum()
    some = choose_pieces(tokenizer, counts, limit=least + 8)
    assert least < len(some) <= least + 8 and set(some) < set(every)
    half = choose_pieces(tokenizer, counts, coverage=0.9)
    assert len(half) < len(every) and counts[half].sum() >= 0.9 * counts.sum()
    # What goes is no more frequent than what stays for its own sake.
    gone, own = set(every) - set(half), set(half) - set(choose_pieces(tokenizer, counts, coverage=1e-9))
    if kind != "BPE":
        assert max(counts[list(gone)]) <= min(counts[list(own)])
    with pytest.raises(ValueError, match=f"at least {least} pieces.*limit is 5"):
        choose_pieces(tokenizer, counts, limit=5)


def test_bad_input_to_the_choice(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match=r"WordPiece, BPE, Unigram.*got WordLevel"):
        choose_pieces(tokenizer, np.ones(100))
    fast = trained("WordPiece")
    with pytest.raises(ValueError, match="corpus holds no token"):
        choose_pieces(fast, np.zeros(len(fast), dtype=np.int64))
    with pytest.raises(ValueError, match=r"`coverage`.*got 0"):
        choose_pieces(fast, np.ones(len(fast)), coverage=0)
    with pytest.raises(ValueError, match="must be below 3"):
        count_pieces([Dataset.from_dict({"input_ids": [[0, 3]]})], 3)
    with pytest.raises(ValueError, match="must be made from the other"):
        kept_ids(fast, trained("BPE"))

    class Slow:
        pass

    with pytest.raises(ValueError, match=r"must be a fast one.*got Slow"):
        choose_pieces(Slow(), np.ones(3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind"), [("paraphrase-MiniLM-L3-v2", "WordPiece"), ("e5-small-en-pt-12L384", "Unigram")]
)
def test_real_tokenizers_and_text(name: str, kind: str) -> None:
    folder, file = SHARED / "models" / name, SHARED / "data/glue/rte/validation.parquet"
    if not (folder.is_dir() and file.is_file()):
        pytest.skip(f"needs {name} and RTE's validation rows among the shared data")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = load_dataset("parquet", data_files=str(file), split="train")
    first, second = list(rows["sentence1"])[:150], list(rows["sentence2"])[:150]
    ids, small = pruned(tokenizer, first)
    assert json.loads(small.backend_tokenizer.to_str())["model"]["type"] == kind
    assert len(ids) < 0.4 * len(tokenizer)
    assert segmentation_change(tokenizer, small, first)["texts_changed"] == 0
    assert [[ids[i] for i in row] for row in small(first)["input_ids"]] == tokenizer(first)["input_ids"]
    change = segmentation_change(tokenizer, small, second)
    assert 0 < change["texts_changed"] < 1 and 0 < change["mean_length_change"] < 1


# ----------------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("head", ["sequence-classification", "masked-lm"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_model_of_fewer_rows_answers_as_before(family: str, head: str, tmp_path: Path) -> None:
    model = tiny(family, head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    inputs = batch(model)
    ids = sorted(set(inputs["input_ids"].flatten().tolist()) | set(range(5)))
    small = keep_vocabulary(model, ids)
    new = torch.full((100,), -1)
    new[ids] = torch.arange(len(ids))
    with torch.no_grad():
        long = model(**inputs).logits
        short = small(**{**inputs, "input_ids": new[inputs["input_ids"]]}).logits
    assert torch.allclose(short, long[..., ids] if head == "masked-lm" else long, atol=1e-6)
    assert structure_of(small).vocab_size == small.config.vocab_size == len(ids)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    save_model(small, tmp_path / "small")
    again = load_model(tmp_path / "small", head=head)
    with torch.no_grad():
        assert torch.equal(again(**{**inputs, "input_ids": new[inputs["input_ids"]]}).logits, short)
    if head == "masked-lm":
        tied = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, small)]
        assert tied[0] == tied[1]
        labels = new[inputs["input_ids"]]
        assert torch.isfinite(small(input_ids=labels, labels=labels).loss)


def test_slim_models_too() -> None:
    model = tiny("bert")
    slim = keep_units(model, PruningPlan(heads=((0,), (), (1, 2), (3,)), ffn=((1, 5), tuple(range(8)), (), (2,))))
    inputs = batch(slim)
    ids = sorted({0, *inputs["input_ids"].flatten().tolist()})
    small = keep_vocabulary(slim, ids)
    assert type(small) is type(slim) and structure_of(small).layer_widths == structure_of(slim).layer_widths
    new = {old: i for i, old in enumerate(ids)}
    with torch.no_grad():
        again = small(**{**inputs, "input_ids": inputs["input_ids"].clone().apply_(new.get)}).logits
        assert torch.equal(again, slim(**inputs).logits)


def test_special_ids_move_with_the_tokens() -> None:
    model = tiny("modernbert", pad_token_id=50, cls_token_id=60, sep_token_id=70, bos_token_id=60, eos_token_id=70)
    small = keep_vocabulary(model, [3, 50, 60, 70, 99])
    assert [getattr(small.config, f"{n}_token_id") for n in ("pad", "cls", "sep", "bos", "eos")] == [1, 2, 3, 2, 3]
    assert small.get_input_embeddings().padding_idx == 1
    with pytest.raises(ValueError, match=r"special tokens.*\[50, 60\] are missing"):
        keep_vocabulary(model, [3, 70])


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
def test_the_padding_stays_where_positions_are_counted_from_it(family: str) -> None:
    model = tiny(family)
    assert {0, 1} <= token_ids_in_config(model)
    with pytest.raises(ValueError, match=r"\[0\] are missing"):
        keep_vocabulary(model, [1, 2, 5])


@pytest.mark.parametrize("ids", [[], [1, 0], [0, 0], [-1, 0], [0, 100]])
def test_ids_that_are_not_there(ids: list[int]) -> None:
    with pytest.raises(ValueError, match=r"`ids` must be ascending.*0 to 99"):
        keep_vocabulary(tiny("bert"), ids)


# ------------------------------------------------------------------------------------------------------------------ stage

TASK = Task("animals", ("text",), label_names=("cat", "hat"))


def rows(words: tuple[str, ...] = ("cat", "hat"), n: int = 24) -> Dataset:
    return Dataset.from_dict(
        {
            "text": [f"the {words[i % 2]} sat {i % 7} times on that mat" for i in range(n)],
            "label": [i % 2 for i in range(n)],
        }
    )


@pytest.fixture
def run(tmp_path: Path) -> Context:
    """A run whose tokenizer is a WordPiece one, with a pool of other words."""
    tokenizer = trained("WordPiece")
    data = prepare(TASK, {"train": rows(), "validation": rows(("catalogue", "habits"), 8)})
    pool = prepare(TASK, {"unlabelled": Dataset.from_dict({"text": ["mattresses and plans"] * 4})}, ("unlabelled",))
    context = Context(tokenizer, tokenised(TASK, data, tokenizer, 32), tmp_path / "cache", args=QUIET, seed=1)
    texts = pool["unlabelled"]
    return replace(
        context, pool=tokenised(TASK, {"train": texts, "validation": texts}, tokenizer, 32).train, pool_texts=texts
    )


def model_for(context: Context, **sizes: Any) -> Any:
    return tiny("bert", vocab_size=len(context.tokenizer) + 3, pad_token_id=1, layers=2, **sizes)


def test_the_stage_prunes_and_reports(run: Context, tmp_path: Path) -> None:
    model = model_for(run)
    stage = VocabPruning()
    assert stage.outline(Outline(structure_of(model)), run) == Outline(structure_of(model), outer_known=False)
    small, info = stage.run(model, run, tmp_path)
    after = stage.context_after(run, tmp_path)
    kept = info["pieces"]["after"]
    assert kept == len(after.tokenizer) == small.config.vocab_size < info["pieces"]["before"] == len(run.tokenizer)
    assert info["mb"]["after"] < info["mb"]["before"]
    assert info["corpus_coverage"] == 1.0 and set(info["coverage_by_class"].values()) == {1.0}
    assert 0 < info["held_out"]["texts_changed"] <= 1 and info["held_out"]["mean_length_change"] > 0
    # The pool's words stay, the validation rows' may go.
    assert "plans" in after.tokenizer.get_vocab()
    assert run.evaluate(model).keys() == after.evaluate(small).keys()
    a, b = run.collator([run.data.train[0]]), after.collator([after.data.train[0]])
    with torch.no_grad():
        one, two = (
            m(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).logits for m, x in ((model, a), (small, b))
        )
    assert torch.equal(one, two) and not torch.equal(a["input_ids"], b["input_ids"])


def test_budgets(run: Context, tmp_path: Path) -> None:
    model = model_for(run)
    most = len(choose_pieces(run.tokenizer, counts_of(run.tokenizer, list(rows()["text"]))))
    few = VocabPruning(pieces=most - 2, min_class_coverage=0.1).run(model, run, tmp_path)[0]
    assert few.config.vocab_size <= most - 2
    total = sum(p.numel() for p in model.parameters())
    for budget in (total - 20 * 32, f"{(total - 20 * 32) / total:.6f}"):
        small = VocabPruning(params=budget, min_class_coverage=0.1).run(model, run, tmp_path)[0]
        assert sum(p.numel() for p in small.parameters()) <= total - 20 * 32 + 1
    with pytest.raises(ValueError, match="`params` must be above"):
        VocabPruning(params=1000).run(model, run, tmp_path)


def test_later_stages_teachers_and_resuming(run: Context, tmp_path: Path) -> None:
    model = model_for(run)
    context = replace(run, teacher=model_for(run, seed=3))
    fast: dict[str, Any] = {"max_steps": 1, "batch_size": 8}
    recipe = Recipe(
        stages=(
            Distill(**fast),
            VocabPruning(),
            Distill(objectives=({"kind": "logits"}, {"kind": "hidden"}), **fast),
            Distill(teacher="01-distill", **fast),
        ),
        max_length=32,
    )
    runner = Runner(tmp_path / "out")
    small, records = run_recipe(recipe, model, context, runner)
    assert small.config.vocab_size == records[1]["pieces"]["after"] < model.config.vocab_size
    for name in recipe.folder_names[1:]:
        assert len(AutoTokenizer.from_pretrained(tmp_path / "out" / name)) == small.config.vocab_size
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out/01-distill")) == len(run.tokenizer)
    end = context_at_end(recipe, context, runner)
    assert end.teacher is not None and end.teacher.config.vocab_size == small.config.vocab_size
    again, _ = run_recipe(recipe, model, context, Runner(tmp_path / "out"))
    assert all(torch.equal(a, b) for a, b in zip(small.state_dict().values(), again.state_dict().values(), strict=True))


def test_a_teacher_with_a_list_of_pieces_alone_follows_too(tmp_path: Path) -> None:
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{c}" for c in "abcdefgh"), "cab", "bad"]
    model = tiny("bert", layers=1, vocab_size=len(pieces))
    model.save_pretrained(tmp_path)
    assert with_pieces_of(model, tmp_path, AutoTokenizer) is model  # a folder without any says nothing
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    own = AutoTokenizer.from_pretrained(tmp_path)
    assert own.get_vocab()["cab"] == 21 and with_pieces_of(model, tmp_path, own) is model
    small = prune_tokenizer(own, [i for i in range(len(pieces)) if i not in (7, 15)])
    follows = with_pieces_of(model, tmp_path, small)
    one, other = (t("cab bad", return_tensors="pt") for t in (own, small))
    assert one["input_ids"].tolist() != other["input_ids"].tolist()
    with torch.no_grad():
        torch.testing.assert_close(follows.eval()(**other).logits, model.eval()(**one).logits)


def test_stage_as_yaml() -> None:
    recipe = Recipe(stages=(VocabPruning(coverage=0.99, pieces="1/2", min_class_coverage=0.5),))
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"coverage": 0}, "`coverage`"),
        ({"coverage": "all"}, "`coverage`"),
        ({"min_class_coverage": 1.5}, "`min_class_coverage`"),
        ({"pieces": 0}, "`pieces` must be above 0"),
        ({"pieces": "lots"}, "`pieces`"),
        ({"params": -3}, "`params`"),
        ({"corpus": ""}, "`corpus`"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        VocabPruning(**options)


def test_a_corpus_without_the_texts_of_a_class(run: Context, tmp_path: Path) -> None:
    data = replace(run.data, train=run.data.train.filter(lambda row: row["labels"] == 0))
    with pytest.raises(ValueError, match="texts of every class, and 'hat' has none"):
        VocabPruning().outline(Outline(structure_of(model_for(run))), replace(run, data=data))
    file = tmp_path / "corpus.txt"
    file.write_text("the cat sat 0 1 2 3 4 5 6 times on that mat\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"cover .* of class 'hat'"):
        VocabPruning(corpus=str(file), min_class_coverage=0.99).run(model_for(run), run, tmp_path)
    VocabPruning(corpus=str(file), min_class_coverage=0.5).run(model_for(run), run, tmp_path)


def test_bad_corpora(run: Context, tmp_path: Path) -> None:
    before = Outline(structure_of(model_for(run)))
    with pytest.raises(ValueError, match=r"no file 'nowhere\.txt'"):
        VocabPruning(corpus="nowhere.txt").outline(before, run)
    for content, message in ((b"\n \n", "has none"), (b"caf\xe9\n", "must be UTF-8")):
        (file := tmp_path / "corpus.txt").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            VocabPruning(corpus=str(file)).outline(before, run)
    (table := tmp_path / "corpus.csv").write_text("title\nx\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"text columns text.*has title"):
        VocabPruning(corpus=str(table)).outline(before, run)
    table.write_text("text,title\nthe cat hat sat 1 2 3 on that mat times,x\n", encoding="utf-8")
    VocabPruning(corpus=str(table), min_class_coverage=0.5).run(model_for(run), run, tmp_path)


def test_a_long_corpus_is_counted_slice_by_slice(run: Context, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, lines = tmp_path / "corpus.txt", [f"the cat {i} sat on that hat" for i in range(2500)]
    file.write_text("\n".join(lines), encoding="utf-8")
    ids = [i for row in run.tokenizer(lines)["input_ids"] for i in row if i not in run.tokenizer.all_special_ids]
    sizes, original = [], type(run.tokenizer).__call__

    def watched(self: Any, texts: list[str], *args: Any, **options: Any) -> Any:
        sizes.append(len(texts))
        return original(self, texts, *args, **options)

    monkeypatch.setattr(type(run.tokenizer), "__call__", watched)
    counts = VocabPruning(corpus=str(file))._counts(run, len(run.tokenizer))
    assert sizes == [1000, 1000, 500]
    assert np.array_equal(counts, np.bincount(ids, minlength=len(run.tokenizer)))


@pytest.mark.parametrize("name", ["service", "vocabulary"])
def test_shipped_recipes_fit_a_tokenizer_that_can_lose_pieces(run: Context, name: str) -> None:
    model = model_for(run) if name == "vocabulary" else tiny("bert", layers=6, vocab_size=len(run.tokenizer))
    context = replace(run, teacher=freeze(model))
    after = Recipe.named(name).check(Outline(structure_of(model)), context)
    assert not after.outer_known and len(after.structure.layer_widths) == 2


def test_runs_that_cannot_be_pruned(run: Context, context: Context) -> None:
    before = Outline(structure_of(tiny("bert")))
    with pytest.raises(ValueError, match="got WordLevel"):
        VocabPruning().outline(before, context)
    bare = TaskData(run.data.task, run.data.train, run.data.validation)
    with pytest.raises(ValueError, match="needs the texts of 'animals'"):
        VocabPruning().outline(before, replace(run, data=bare))
    with pytest.raises(ValueError, match="texts of the pool"):
        VocabPruning().outline(before, replace(run, pool_texts=None))


def test_compress_reports_each_model_in_its_own_vocabulary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timings = {"1x128": {"p50": 1.0, "p95": 1.0}}
    # The package's name `compress` is the function.
    monkeypatch.setattr(
        importlib.import_module("smbert.compress"),
        "latency",
        lambda models, *args, **kwargs: dict.fromkeys(models, timings),
    )
    tokenizer = trained("WordPiece")
    model = tiny("bert", vocab_size=len(tokenizer), pad_token_id=1, layers=2)
    data = prepare(TASK, {"train": rows(), "validation": rows(n=8)})
    result = compress(
        model,
        Recipe(
            stages=(DepthReduction(layers=1, method="truncate"), VocabPruning(), Distill(max_steps=1)), max_length=32
        ),
        task=TASK,
        train_dataset=data["train"],
        eval_dataset=data["validation"],
        unlabelled_dataset=Dataset.from_dict({"text": ["mattresses and plans"] * 4}),
        tokenizer=tokenizer,
        output_dir=tmp_path / "out",
        args=QUIET,
    )
    assert result.model.config.vocab_size == len(result.tokenizer) < len(tokenizer)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out/model")) == len(result.tokenizer)
    sizes = {row.name: row.params_embedding for row in result.report.rows if row.params_embedding}
    small = sizes["teacher"] - 32 * (len(tokenizer) - len(result.tokenizer))
    assert sizes["smbert"] == sizes["same shape, no distillation"] == small
