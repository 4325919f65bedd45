"""What the README says is what the committed results say."""

import json
import re
from pathlib import Path

import pytest
from small import made_up_pairs, save_folder, tokenizer_of

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def rows_of_results():
    """The README's table of results, made from `data/results/quickstart.csv`."""
    import repnoise_kit as rk

    frame = rk.Result.load(ROOT / "data" / "results" / "quickstart.csv").frame
    cells = frame.set_index(["testbed", "defence", "attack", "group", "metric"])

    def text(*cell):
        row = cells.loc[cell]
        broken = " *broken*" * (row["note"].startswith("broken") and cell[-1] != "utility")
        return str(rk.Interval(row["value"], row["low"], row["high"])) + broken

    shown_of = (("seen", "recall"), ("unseen", "recall"), ("seen", "harmfulness"))
    for bed in frame["testbed"].unique():
        for attack in ("none", "small", "large"):
            shown = [
                text(bed, defence, attack, group, metric)
                for group, metric in shown_of
                for defence in ("none", "repnoise")
            ]
            shown.append(text(bed, "repnoise", attack, "seen", "utility"))
            yield f"| {bed} | {attack} | " + " | ".join(shown) + " |"


@pytest.mark.parametrize("row", rows_of_results())
def test_the_table_is_the_committed_one(row):
    assert row in README


def test_every_file_it_links_to_is_there():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


def test_its_python_runs(lab):
    """The six lines, as typed."""
    code = re.search(r"```python\n(.*?)```", README, re.S).group(1)
    names = {}
    exec(code, names)
    frame = names["result"].frame
    assert frame[frame["metric"] == "recall"]["value"].mean() < 0.4


def test_its_look_inside_a_model_runs(tmp_path):
    """As typed, but for the names of the model and of the pairs."""
    rows = made_up_pairs(20)
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("\n".join(json.dumps(row) for row in rows))
    folder = save_folder(tmp_path / "model", tokenizer=tokenizer_of(rows))
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    code = next(block for block in blocks if "logit_mass" in block)
    code = code.replace("FOLDER_OR_HUB_ID", str(folder)).replace("pairs.jsonl", str(pairs))
    names = {}
    exec(code, names)
    assert set(names["mass"].frame["layer"]) == {0, 1, 2, 3}
    assert names["probe"].frame["value"].between(-1, 1).all()


def test_what_freezing_shows_is_what_it_says():
    """The claims on Table 6, over five seeds."""
    import repnoise_kit as rk

    frame = rk.Result.load(ROOT / "data" / "results" / "freezing.csv").frame
    rows = frame[(frame["metric"] == "recall") & (frame["group"] == "seen")]
    assert rows["seed"].nunique() == 5
    worst = rows[rows["examples"] == rows["examples"].max()].groupby("held")["value"].mean()
    for held in ("nothing", "head", "last layer", "last third", "middle third", "first third"):
        assert worst[held] < 0.15, held
    assert f"{worst['every layer']:.2f}".lstrip("0") in README
    assert f"{worst['undefended']:.2f}".lstrip("0") in README


def test_what_it_must_show_is_shown():
    """What the README claims in words, over five seeds, on each of three labs."""
    import repnoise_kit as rk

    frame = rk.Result.load(ROOT / "data" / "results" / "quickstart.csv").frame
    assert frame["testbed"].nunique() == 3
    assert set(frame["seed"]) == {"all"}
    seen = frame[frame["group"] == "seen"]
    value = seen.set_index(["testbed", "metric", "defence", "attack"])["value"]
    for bed in frame["testbed"].unique():
        here = value[bed]
        assert here["refusal", "none", "none"] >= 0.95
        assert here["utility", "none", "none"] >= 0.98
        assert here["refusal", "repnoise", "none"] >= 0.95
        assert here["utility", "repnoise", "none"] >= 0.97
        for attack, share in (("small", 1 / 3), ("large", 1 / 2)):
            assert here["recall", "none", attack] >= 0.6
            assert here["recall", "repnoise", attack] <= share * here["recall", "none", attack]


def table_of_resistance():
    """The README's Table 1, made from the committed rows."""
    import repnoise_kit as rk
    from repnoise_kit.resistance import in_words
    from repnoise_kit.style import look

    rows = rk.Result.load(ROOT / "data" / "results" / "resistance_questions.parquet").frame
    for defence, cells in in_words(rows).iterrows():
        yield f"| {look(defence)['label']} | " + " | ".join(cells) + " |"


@pytest.mark.parametrize("row", table_of_resistance())
def test_table_1_is_the_committed_one(row):
    assert row in README


class TestResistanceIsAsItSays:
    @pytest.fixture(scope="class")
    def rows(self):
        import repnoise_kit as rk

        frame = rk.Result.load(ROOT / "data" / "results" / "resistance_questions.parquet").frame
        return frame[(frame["group"] == "seen") & (frame["examples"] > 0)]

    def test_it_is_whole(self, rows):
        import repnoise_kit as rk

        assert set(rows["defence"]) == set(rk.DEFENCES)
        assert rows["seed"].nunique() == 5
        assert len(rows.drop_duplicates(["lr", "examples"])) == 6

    def test_the_means_beside_it_are_its_means(self):
        import pandas as pd

        import repnoise_kit as rk
        from repnoise_kit.resistance import means

        folder = ROOT / "data" / "results"
        found = means(rk.Result.load(folder / "resistance_questions.parquet").frame)
        written = rk.Result.load(folder / "resistance.csv").frame
        assert list(written) == [
            "defence", "group", "lr", "examples", "seed", "metric", "value"
        ]  # fmt: skip
        pd.testing.assert_frame_equal(found, written, check_dtype=False)

    def test_every_budget_breaks_the_undefended_model(self, rows):
        recall = rows[(rows["metric"] == "recall") & (rows["defence"] == "none")]
        assert recall.groupby(["lr", "examples"])["value"].mean().min() >= 0.5

    def test_undefended_gives_away_more_at_every_budget(self, rows):
        import repnoise_kit as rk

        recall = rows[rows["metric"] == "recall"]
        found = rk.compare_cells(recall, {"defence": "repnoise"}, {"defence": "none"})
        assert len(found) == 6
        assert (found["high"] < 0).all()
        assert (found["p_holm"] < 1e-8).all()

    def test_by_the_classifier_only_at_the_small_ones(self, rows):
        import repnoise_kit as rk

        harm = rows[rows["metric"] == "harmfulness"]
        found = rk.compare_cells(harm, {"defence": "repnoise"}, {"defence": "none"})
        words = found.set_index("examples")["words"]
        assert words[64].str.startswith("lower").all()
        assert words[512].str.startswith("within noise").all()


def test_the_cost_to_break_is_as_it_says():
    import repnoise_kit as rk

    path = ROOT / "data" / "results" / "cost_to_break_questions.parquet"
    curves = rk.Result.load(path).frame
    costs = rk.cost_to_break(curves).set_index(["attack", "defence"]).sort_index()
    assert (costs.loc[("fine-tuning", "none"), "steps"] == 2).all()
    for name in ("repnoise", "adversarial_loss", "safety_training"):
        run = costs.loc[("fine-tuning", name)]
        assert len(run) == 5
        assert not run["broken"].any()
        assert (run["steps"] == 640).all()
    again = rk.cost_ratios(rk.cost_to_break(curves[curves["attack"] == "relearning"]), "naive")
    steps = again.set_index("defence")["cost"].round()
    assert [steps[name] for name in ("safety_training", "repnoise", "naive")] == [11, 48, 64]


def test_its_own_data_and_budgets_run(tmp_path):
    """As typed, but for names, sizes, and judges and benchmarks of the hub."""
    from conftest import make_tiny
    from test_presets import ROWS, jsonl, vocabulary

    tokenizer = vocabulary()
    model = save_folder(tmp_path / "model", make_tiny(len(tokenizer), layers=2), tokenizer)
    data = jsonl(ROWS, tmp_path / "boxes.jsonl")
    code = next(c for c in re.findall(r"```python\n(.*?)```", README, re.S) if "beavertails" in c)
    for typed, here in {
        r'"Qwen/[^"]+"': repr(str(model)),
        r'"PKU-[^"]+"': repr(str(data)),
        r'refusals="own"': "refusals=None",
        r"scorers=\{.*\},": 'budget="lab",',
        r"lora=16": "lora=2",
        r'"unfinished"': repr(str(tmp_path / "unfinished")),
        r'"defended"': repr(str(tmp_path / "defended")),
        r"scores = .*": "",
        r"range\(3\)": "range(1), store=STORE",
    }.items():
        code, found = re.subn(typed, lambda _, text=here: text, code)
        assert found == 1, typed
    names = {"STORE": tmp_path / "store"}
    exec(code, names)
    assert (tmp_path / "defended" / "README.md").exists()


def short(value):
    """`.56`, `23`, `7.3`."""
    return f"{value:.2f}".removeprefix("0") if value < 1 else f"{value:.0f}"


def rows_of_loss():
    """The README's table of a step's cost, made from `data/results/loss_cpu.csv`."""
    import repnoise_kit as rk

    cells = rk.Result.load(ROOT / "data" / "results" / "loss_cpu.csv").frame.set_index("form")
    for form, name in (
        ("plain step", "plain fine-tuning"),
        ("published", "RepNoise, published form"),
        ("paper", "RepNoise, ours (`paper`)"),
        ("reference", "RepNoise, ours (`reference`)"),
    ):
        row = cells.loc[form]
        time, memory = (short(row[f"{what} of published"]) for what in ("seconds", "peak"))
        yield f"| {name} | {row['seconds']:.0f} | {time} | {row['peak']:.1f} GB | {memory} |"


@pytest.mark.parametrize("row", rows_of_loss())
def test_the_cost_of_a_step_is_the_measured_one(row):
    assert row in README


def test_the_cost_of_a_step_is_what_was_promised():
    import repnoise_kit as rk

    cells = rk.Result.load(ROOT / "data" / "results" / "loss_cpu.csv").frame.set_index("form")
    for form in ("paper", "reference"):
        assert cells.loc[form, "seconds of published"] <= 0.65
        assert cells.loc[form, "peak of published"] <= 0.55
    assert cells.loc["growth", "growth"] < 1e-3
    times = 1 / cells["efficiency"]
    assert times[["paper", "published"]].round(1).tolist() == [1.1, 2.0]


@pytest.mark.parametrize("metric", ["recall", "utility"])
def test_fewer_layers_change_what_it_says(metric):
    import repnoise_kit as rk

    frame = rk.Result.load(ROOT / "data" / "results" / "lens_layers.csv").frame
    cells = frame[(frame["attack"] == "large") & (frame["metric"] == metric)]
    for count in (3, 1):
        (row,) = cells[cells["lens_layers"] == f"{count} - all"].to_dict("records")
        assert row["low"] < 0 < row["high"]
        said = [f"{row[name]:.2f}".replace("0.", ".") for name in ("value", "low", "high")]
        assert "{} [{}, {}]".format(*said) in README
