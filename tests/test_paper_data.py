"""The published numbers: every table is there, tidy, whole, and as printed."""

from pathlib import Path

import pandas as pd
import pytest

PAPER = Path(__file__).parents[1] / "data" / "paper"

# Models (or their like) times columns, counted in the print; p-values and the like come on top.
ROWS = {
    "resistance": 9 * 7,
    "toxicity": 6 * 4,
    "stability": 2 * 7,
    "trainability": 4 * 5 * 2,
    "generalization": 6 * 6,
    "freezing": 7 * 3,
    "learning_rates": 2 * 8,
    "metrics": 3 * 4 + 3,
    "cross_domain": 6 * 4,
    "robbie": 2 * 5 + 2,
    "xstest": 4 * 6 + 2,
    "harmbench": 4 * 4 + 1,
    "ablation": 3 * 3,
    "mask_and_lens": 3 * 7,
    "hyperparameters": 2 + 2 + 4,
    "seeds": 3 * 3,
    "samples": 3 * 6,
    "sampling": 2 * 3,
    "models": 5 * 2 * 7,
    "unaligned": 2 * 7,
    "untabled": 3 + 5 + 4 + 4 + 6,
}
DEFENCES = {
    *("none", "random", "security_vectors", "vaccine", "safety_training", "gradient_ascent"),
    *("adversarial_loss", "repnoise", "smoothllm", "paraphrase"),
}
SHARES = ("harmfulness", "toxicity", "rouge1", "score", "p", "p_below")
MEASURED = ["value", "sd", "note"]
RN = {"defence": "repnoise"}

# Table, what picks the one row, what is printed there.
PRINTED = [
    ("resistance", {**RN, "lr": 8e-5, "examples": 10_000}, 0.12),
    ("resistance", {"defence": "none", "lr": 3e-5, "examples": 1000}, 0.47),
    ("resistance", {"defence": "vaccine", "rho": 10, "lr": 6e-5, "examples": 1000}, 0.75),
    ("resistance", {"defence": "gradient_ascent", "examples": 0}, 0.24),
    ("toxicity", {"defence": "adversarial_loss", "lr": 6e-5}, 0.77),
    ("stability", {**RN, "dataset": "ARC-easy"}, 0.72),
    ("trainability", {**RN, "dataset": "CACAPO", "metric": "rouge1", "tuned": "yes"}, 0.67),
    ("trainability", {**RN, "dataset": "E2E", "metric": "harmfulness", "examples": 0}, 0.16),
    ("generalization", {**RN, "withheld": "toxic", "lr": 3e-5}, 0.06),
    ("freezing", {"frozen": "last layer", "lr": 3e-5, "examples": 10_000}, 0.67),
    ("learning_rates", {"defence": "none", "lr": 5e-4}, 0.0),
    ("metrics", {"defence": "none", "attacked": "yes", "judge": "gpt-4o-mini"}, 4.27),
    (
        "cross_domain",
        {"defended_on": "DecodingTrust", "attacked_on": "BeaverTails", "lr": 6e-5},
        0.43,
    ),
    ("robbie", {"defence": "none", "dataset": "regard"}, 0.19),
    ("xstest", {**RN, "prompts": "safe", "answer": "partial"}, 17.29),
    ("harmbench", {"defence": "paraphrase", "attack": "direct_request"}, 14),
    ("ablation", {"removed": "noise", "lr": 8e-5, "examples": 10_000}, 0.71),
    ("mask_and_lens", {"removed": "mask", "lr": 6e-5, "examples": 10_000}, 0.0),
    ("hyperparameters", {"parameter": "beta", "setting": 0.0001}, 0.75),
    ("seeds", {"seed": 17, "lr": 8e-5, "examples": 1000}, 0.79),
    ("samples", {"samples": 5000, "lr": 8e-5, "examples": 1000}, 0.4),
    ("sampling", {"sampling": "nucleus", "examples": 1000}, 0.09),
    ("models", {**RN, "model": "Qwen1.5-4B-Chat", "lr": 8e-5, "examples": 10_000}, 0.10),
    ("unaligned", {**RN, "lr": 3e-5, "examples": 1000}, 0.45),
    ("untabled", {**RN, "lr": 3e-4}, 0.74),
]

# Cells that must not be read without their note, and a word of it.
DOUBTED = [
    ("seeds", {"seed": 42}, "table 1"),
    ("ablation", {"removed": "ascent"}, "removed"),
    ("mask_and_lens", {"removed": "mask"}, "removed"),
    ("generalization", {**RN, "withheld": "toxic", "lr": 3e-5}, "poster"),
    ("generalization", {**RN, "withheld": "crime"}, "no-op"),
    ("freezing", {"frozen": "layers 0-10"}, "substring"),
    ("learning_rates", {**RN, "lr": 4e-5}, "disfluent"),
    ("trainability", {"metric": "harmfulness"}, "already tuned"),
    ("samples", {"samples": 5000, "lr": 8e-5, "examples": 1000}, "printed as .4"),
]


def table(name: str) -> pd.DataFrame:
    return pd.read_csv(PAPER / f"{name}.csv")


def picked(name: str, where: dict) -> pd.DataFrame:
    found = table(name)
    for column, wanted in where.items():
        found = found[found[column] == wanted]
    return found


def test_the_index_names_every_file_and_no_other():
    index = table("tables")
    assert list(index) == ["name", "number", "title", "setting", "metric"]
    assert index.notna().all().all()
    assert index.name.is_unique
    assert {p.stem for p in PAPER.iterdir()} - {"tables"} == set(index.name) == set(ROWS)


def test_the_index_counts_the_tables_of_the_paper():
    numbers = list(table("tables").number)
    assert numbers.pop() == "text"
    spelt = ", ".join(numbers).replace("16-18", "16, 17, 18").split(", ")
    assert sorted(map(int, spelt)) == list(range(1, 24))


@pytest.mark.parametrize("name", ROWS)
def test_a_table_is_tidy(name):
    found = table(name)
    assert len(found) == ROWS[name]
    assert {"metric", "value", "note"} <= set(found)
    assert found.metric.notna().all()
    assert pd.api.types.is_numeric_dtype(found.value)
    assert found.value.notna().all()
    assert not found.duplicated([c for c in found if c not in MEASURED]).any()
    assert set(found.defence.dropna()) <= DEFENCES
    assert found[found.metric.isin(SHARES)].value.between(0, 1).all()
    assert found[found.metric == "percent"].value.between(0, 100).all()
    assert found[found.metric == "judge_score"].value.between(1, 5).all()


@pytest.mark.parametrize("name", ROWS)
def test_a_learning_rate_goes_with_an_attack(name):
    found = table(name)
    if {"lr", "examples"} <= set(found):
        assert found[found.examples == 0].lr.isna().all()
        assert (found.examples.isna() | (found.examples >= 0)).all()


@pytest.mark.parametrize("name", ROWS)
def test_the_index_says_what_each_metric_is(name):
    said = table("tables").set_index("name").metric[name]
    assert all(metric in said for metric in table(name).metric.unique())


@pytest.mark.parametrize(("name", "where", "value"), PRINTED)
def test_a_value_is_as_printed(name, where, value):
    assert list(picked(name, where).value) == [value]


@pytest.mark.parametrize(("name", "where", "word"), DOUBTED)
def test_a_doubtful_cell_says_so(name, where, word):
    found = picked(name, where)
    assert len(found)
    assert found.note.str.contains(word, regex=False, na=False).all()


def test_answers_of_a_prompt_set_add_up():
    found = table("xstest")
    whole = found[found.metric == "percent"].groupby(["defence", "prompts"]).value.sum()
    assert whole.between(99.98, 100.02).all()


def test_tables_agree_where_they_print_the_same_cell():
    key = ["lr", "examples"]
    first = table("resistance").query("defence == 'repnoise'").set_index(key).value
    for name, where in [
        ("freezing", {"frozen": "nothing"}),
        ("ablation", {"removed": "nothing"}),
        ("sampling", {"sampling": "greedy"}),
    ]:
        other = picked(name, where).set_index(key).value
        assert (first[other.index] == other).all(), name
