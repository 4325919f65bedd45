"""The whole experiment on a model and a file a user brings, and the judge it is scored with."""

import base64
import contextlib
import io
import json
import re
import shutil

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small import everyday_rows, made_up_pairs, save_folder

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURES = ("resistance", "questions", "price", "terms", "unseen")
TABLES = ("results.csv", "summary.csv", "curves.csv", "report.html")


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    save_folder(folder / "tiny & co")
    (folder / "pairs.json").write_text(json.dumps(made_up_pairs()))
    lines = [json.dumps(row) for row in everyday_rows()]
    (folder / "retain.jsonl").write_text("\n".join(lines))
    return folder


def quickstart(own, *words, pairs="pairs.json", out="out"):
    """Run the command in this process; return its exit code, its stdout and its stderr."""
    import matplotlib

    from repnoise_kit.__main__ import main

    matplotlib.use("Agg")
    said, warned = io.StringIO(), io.StringIO()
    given = ["--model", str(own / "tiny & co"), "--pairs", str(own / pairs)]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(warned):
        code = main(["quickstart", *given, "--out", str(own / out), *words])
    return code, said.getvalue(), warned.getvalue()


def with_retain(own, *words, out="out"):
    return quickstart(own, "--retain", str(own / "retain.jsonl"), *words, out=out)


@pytest.fixture
def undrawn(monkeypatch):
    """Leave the figures out, where they are not what is tested: they take longer than training."""
    from repnoise_kit import report

    monkeypatch.setattr(report, "figures", lambda *_: {})


@pytest.fixture(scope="module")
def finished(own):
    code, said, _ = with_retain(own)
    assert code == 0
    return said


class TestQuickstart:
    @pytest.fixture(autouse=True)
    def _ran(self, finished):
        pass

    def test_all_files_are_there(self, own):
        for name in (*TABLES, *(f"{picture}.png" for picture in PICTURES)):
            assert (own / "out" / name).stat().st_size > 100, name
        assert not list((own / "out").rglob(".*"))

    def test_the_summary_has_the_agreed_columns_and_every_cell(self, own):
        cells = pd.read_csv(own / "out" / "summary.csv")
        agreed = ["defence", "attack", "group", "metric", "value", "low", "high", "n", "seed"]
        assert set(agreed) <= set(cells)
        assert set(cells["defence"]) == {"none", "repnoise"}
        assert set(cells["attack"]) == {"none", "small", "large"}
        assert set(cells["group"]) == {"seen", "unseen"}
        assert {"recall", "harmfulness", "refusal", "utility", "degenerate"} <= set(cells["metric"])
        assert len(cells) == 2 * 3 * 2 * cells["metric"].nunique()
        assert ((cells["low"] <= cells["value"]) & (cells["value"] <= cells["high"])).all()
        assert set(cells["seed"]) == {0}

    def test_the_summary_is_the_mean_of_the_rows(self, own):
        rows = pd.read_csv(own / "out" / "results.csv")
        keys = ["defence", "attack", "group", "metric"]
        cells = pd.read_csv(own / "out" / "summary.csv").set_index(keys)
        for metric in ("recall", "harmfulness", "refusal", "utility"):
            of_metric = rows[rows["metric"] == metric].groupby(keys)["value"]
            for cell, value in of_metric.mean().items():
                assert cells.loc[cell, "value"] == pytest.approx(value)
            for cell, count in of_metric.size().items():
                assert cells.loc[cell, "n"] == count

    def test_a_row_a_question_and_metric_with_what_was_said(self, own):
        rows = pd.read_csv(own / "out" / "results.csv")
        asked = set(rows.loc[rows["metric"] == "recall", "prompt"])
        # 15 % of 40 things are seen, as many unseen.
        assert len(asked) == 12
        assert asked <= {row["prompt"] for row in made_up_pairs()}
        assert {"testbed", "category", "response", "seed"} <= set(rows)
        keys = ["defence", "attack", "group", "metric", "prompt", "seed"]
        assert not rows.duplicated(keys).any()

    def test_the_curves_hold_each_training(self, own):
        curves = pd.read_csv(own / "out" / "curves.csv")
        defence = curves[curves["attack"].isna()]
        assert {"total", "retain", "noise", "ascent"} <= set(defence["metric"])
        attacks = curves[curves["attack"].notna()]
        assert set(map(tuple, attacks[["defence", "attack"]].to_numpy())) == {
            (d, a) for d in ("none", "repnoise") for a in ("small", "large")
        }

    def test_the_printed_tables_name_groups_defences_and_utility(self, finished):
        for words in ("seen things", "unseen things", "repnoise", "utility", "report.html"):
            assert words in finished
        assert "not measured" not in finished

    def test_the_report_stands_alone(self, own):
        page = (own / "out" / "report.html").read_text(encoding="utf-8")
        links = re.findall(r"""\b(?:src|href)\s*=\s*["']?([^"'\s>]+)""", page)
        assert len(links) == len(PICTURES)
        for link in links:
            kind, _, data = link.partition(",")
            assert kind == "data:image/png;base64"
            assert base64.b64decode(data).startswith(b"\x89PNG")
        assert not re.findall(r"<(?:script|link|iframe)|@import|url\(", page)
        assert "tiny &amp; co" in page
        assert "tiny & co" not in page

    def test_the_same_command_again_reuses_the_finished_seed(self, own, undrawn, monkeypatch):
        from repnoise_kit import quickstart as room

        def never(*_args, **_kwargs):
            raise AssertionError("a finished seed is trained again")

        monkeypatch.setattr(room, "defend_", never)
        monkeypatch.setattr(room, "attack_", never)
        shutil.copytree(own / "out", own / "again")
        (own / "again" / "summary.csv").unlink()
        code, _, _ = with_retain(own, out="again")
        assert code == 0
        for name in ("results.csv", "summary.csv", "curves.csv"):
            assert (own / "again" / name).read_bytes() == (own / "out" / name).read_bytes()

    def test_more_seeds_train_only_what_is_missing(self, own, undrawn):
        shutil.copytree(own / "out" / "seeds", own / "two" / "seeds")
        code, said, warned = with_retain(own, "--seeds", "2", out="two")
        assert code == 0
        assert "seed 1, defence" in warned
        assert "seed 0, defence" not in warned
        assert "95 % intervals over seeds and questions" in said
        assert set(pd.read_csv(own / "two" / "summary.csv")["seed"]) == {"all", "0", "1"}

    def test_a_spoilt_seed_is_made_again_with_a_word(self, own, undrawn):
        shutil.copytree(own / "out" / "seeds", own / "spoilt" / "seeds")
        for table in (own / "spoilt" / "seeds").glob("*/results.csv"):
            table.write_bytes(b"")
        code, _, warned = with_retain(own, out="spoilt")
        assert code == 0
        assert "seed 0, defence" in warned
        assert "damaged" in warned
        same = [(own / out / "results.csv").read_bytes() for out in ("out", "spoilt")]
        assert same[0] == same[1]


def test_without_a_retain_set_utility_is_not_measured(own):
    renamed = {"prompt": "question", "harmful": "told", "harmless": "kept"}
    pd.DataFrame(made_up_pairs()).rename(columns=renamed).to_csv(own / "other.csv", index=False)
    columns = ",".join(f"{ours}={theirs}" for ours, theirs in renamed.items())
    code, said, _ = quickstart(own, "--columns", columns, pairs="other.csv", out="no retain")
    assert code == 0
    assert said.count("not measured") >= 12  # six models, two groups
    cells = pd.read_csv(own / "no retain" / "summary.csv")
    assert "recall" in set(cells["metric"])
    assert "utility" not in set(cells["metric"])


class TestTestbed:
    @pytest.fixture(scope="class")
    def bed(self, own):
        import repnoise_kit as rk

        return rk.testbed(own / "tiny & co", own / "pairs.json", retain=own / "retain.jsonl")

    def test_no_more_examples_than_the_file_holds(self, bed):
        assert len(bed.splits.attack) == 28
        assert {bed.settings[name]["examples"] for name in ("attack", "small", "large")} == {28}
        assert bed.settings["defence"]["examples"] == len(bed.splits.defence) == 34

    def test_held_out_everyday_questions_are_never_trained_on(self, bed):
        unseen = bed.everyday[bed.everyday["group"] == "unseen"]
        assert len(unseen) == len(bed.everyday) - len(unseen) == 4
        assert not set(unseen["thing"]) & set(bed.retain["thing"])
        seen = bed.everyday[bed.everyday["group"] == "seen"]
        assert set(seen["thing"]) <= set(bed.retain["thing"])

    def test_its_fingerprint_is_of_its_data_and_its_seed(self, own, bed):
        import repnoise_kit as rk

        given = own / "tiny & co", own / "pairs.json"
        again = rk.testbed(*given, retain=own / "retain.jsonl")
        assert again.fingerprint() == bed.fingerprint()
        others = [rk.testbed(*given), rk.testbed(*given, retain=own / "retain.jsonl", seed=1)]
        assert len({bed.fingerprint(), *(other.fingerprint() for other in others)}) == 3

    def test_a_retain_table_serves_as_its_file_does(self, own, bed):
        import repnoise_kit as rk

        table = pd.DataFrame(everyday_rows())
        same = rk.testbed(own / "tiny & co", own / "pairs.json", retain=table)
        assert same.fingerprint() == bed.fingerprint()


WORDS = st.lists(st.sampled_from(["red", "Blue", "rose", "box", "7", "a", ",", "."]), max_size=12)


class TestRougeL:
    @settings(derandomize=True, deadline=None, max_examples=150)
    @given(reference=WORDS, response=WORDS)
    def test_it_is_the_recall_of_the_package_rouge_score(self, reference, response):
        from rouge_score.rouge_scorer import RougeScorer

        from repnoise_kit.scoring import rouge_l_recall

        one, other = " ".join(reference), " ".join(response)
        expected = RougeScorer(["rougeL"], use_stemmer=False).score(one, other)["rougeL"].recall
        assert rouge_l_recall(one, other) == pytest.approx(expected)

    def test_by_hand(self):
        from repnoise_kit.scoring import rouge_l_recall

        assert rouge_l_recall("the red box is here", "here: the box, is it?") == 3 / 5
        assert rouge_l_recall("a b", "a b") == 1
        assert rouge_l_recall("a b", "") == rouge_l_recall("", "a b") == 0
