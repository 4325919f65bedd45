"""Results say what they lack, survive the disk whole, and cost nothing to import."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

import repnoise_kit as rk
from repnoise_kit.errors import KitError
from repnoise_kit.results import Result, stack
from repnoise_kit.store import written_whole

ROOT = Path(rk.__file__).parents[1]
MADE = {"seed": 3, "settings": {"lr": 3e-5, "parts": ["mlp", "attention"]}, "device": "cpu"}


def measured(seed: int = 0) -> Result:
    draw = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {
            "defence": ["none", "none", "repnoise", "repnoise"],
            "step": [0, 10, 0, 10],
            "value": draw.normal(size=4) * 1e-7,
            "prompt": ['How, "exactly"?', "Was heißt\ndas?", "c", "d"],
        }
    )
    return Result(frame, MADE)


def write_half(target: Path) -> None:
    with written_whole(target) as fresh:
        fresh.write_text("half")
        raise RuntimeError


def in_fresh_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


# --- A table ---


def test_need_returns_the_table_itself():
    result = measured()
    assert result.need("defence", "value") is result.frame


def test_need_names_every_missing_column_and_no_other():
    with pytest.raises(KitError) as error:
        measured().need("value", "layer", "mass")
    assert str(error.value).endswith("but not ['layer', 'mass']")


def test_need_says_which_columns_there_are():
    with pytest.raises(KitError, match=r"\['defence', 'step', 'value', 'prompt'\]"):
        measured().need("layer")


def test_tagged_adds_a_constant_column_in_front():
    result = measured().tagged(model="base")
    assert list(result.frame.columns) == ["model", "defence", "step", "value", "prompt"]
    assert set(result.frame["model"]) == {"base"}


def test_tagged_replaces_a_column_that_is_there():
    result = measured().tagged(defence="repnoise")
    assert list(result.frame["defence"]) == ["repnoise"] * 4
    assert list(result.frame.columns).count("defence") == 1


def test_tagged_keeps_the_other_columns_and_how_it_was_made():
    before = measured()
    after = before.tagged(model="base")
    assert_frame_equal(after.frame.drop(columns="model"), before.frame)
    assert after.made_with == MADE


# A result is a value: what is made from it leaves it as it was.
def test_tagged_leaves_the_original_alone():
    result = measured()
    result.tagged(defence="x", model="y")
    assert_frame_equal(result.frame, measured().frame)


def test_a_result_is_frozen():
    with pytest.raises(AttributeError):
        measured().frame = pd.DataFrame()


# Rows picked from a larger table keep its index, and one row may have been picked twice.
def test_tagged_goes_by_row_not_by_index():
    frame = measured().frame.iloc[[3, 3, 1]]
    assert list(Result(frame).tagged(model="m").frame["step"]) == [10, 10, 10]


def test_stack_puts_rows_under_one_another():
    first, second = measured(0).tagged(model="a"), measured(1).tagged(model="b")
    both = stack(first, second).frame
    assert list(both["model"]) == ["a"] * 4 + ["b"] * 4
    assert list(both["value"]) == [*first.frame["value"], *second.frame["value"]]


def test_stack_numbers_its_rows_anew():
    assert list(stack(measured(), measured()).frame.index) == list(range(8))


def test_stack_keeps_how_each_was_made():
    assert stack(measured(), Result(measured().frame)).made_with == {"stacked": [MADE, {}]}


# --- Printing ---


def test_a_result_prints_itself_as_a_table():
    lines = repr(Result(pd.DataFrame({"metric": ["recall"], "value": [0.12345]}))).splitlines()
    assert [line.split() for line in lines] == [["metric", "value"], ["recall", "0.123"]]


def test_str_and_repr_agree():
    assert str(measured()) == repr(measured())


def test_html_holds_the_same_table():
    html = Result(pd.DataFrame({"metric": ["recall"], "value": [0.12345]}))._repr_html_()
    frame = html.replace(" ", "").replace("\n", "")
    assert "<th>metric</th><th>value</th>" in frame
    assert "<td>recall</td><td>0.123</td>" in frame


# A model's answer is text from anywhere.
def test_html_escapes_what_an_answer_holds():
    assert "<script>" not in Result(pd.DataFrame({"a": ["<script>"]}))._repr_html_()


def test_a_long_result_prints_short():
    long = Result(pd.DataFrame({"step": range(1000)}))
    assert len(repr(long).splitlines()) < 30
    assert long._repr_html_().count("<tr") < 30


# --- The disk ---


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_load_returns_the_table_that_was_saved(tmp_path, kind):
    path = measured().save(tmp_path / f"deep/er/result.{kind}")
    # Bit for bit: a number read back is the number that was measured.
    assert_frame_equal(Result.load(path).frame, measured().frame, check_exact=True)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_load_returns_how_it_was_made(tmp_path, kind):
    assert Result.load(measured().save(tmp_path / f"result.{kind}")).made_with == MADE


def test_save_takes_and_returns_a_path(tmp_path):
    assert measured().save(str(tmp_path / "a.csv")) == tmp_path / "a.csv"


def test_save_leaves_two_files_and_nothing_else(tmp_path):
    measured().save(tmp_path / "a.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.json"]


# A path, a date, a tensor's dtype: told by their text rather than refused.
def test_save_writes_what_json_does_not_know_as_text(tmp_path):
    Result(measured().frame, {"out": Path("a/b")}).save(tmp_path / "a.csv")
    assert json.loads((tmp_path / "a.json").read_text()) == {"out": str(Path("a/b"))}


def test_a_table_without_its_json_loads(tmp_path):
    measured().frame.to_csv(tmp_path / "bare.csv", index=False)
    assert Result.load(tmp_path / "bare.csv").made_with == {}


def test_an_unknown_suffix_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(KitError, match=r"a\.txt.*\.csv or \.parquet"):
        measured().save(tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_loading_what_is_not_there_names_the_file(tmp_path):
    with pytest.raises(KitError, match=r"nowhere\.csv: no such file"):
        Result.load(tmp_path / "nowhere.csv")


# A folder under a regular file can be made by nobody, root included.
@pytest.mark.parametrize("inside", ["a.csv", "deeper/a.csv"])
def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path, inside):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(KitError, match=r"cannot write to .*choose another folder") as error:
        measured().save(tmp_path / "file" / inside)
    assert "\n" not in str(error.value)
    assert (tmp_path / "file").read_text() == "kept"


def test_an_exception_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError):
        write_half(target)
    assert target.read_text() == "old"


def test_an_exception_leaves_no_new_file(tmp_path):
    with pytest.raises(RuntimeError):
        write_half(tmp_path / "a.txt")
    assert not list(tmp_path.iterdir())


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with written_whole(target) as fresh:
        fresh.write_text("new")
        assert target.read_text() == "old"
    assert target.read_text() == "new"


# A disk that fills up half-way: nothing of the new table is seen, and all of the old one is.
def test_a_save_that_fails_half_way_keeps_the_last_result(tmp_path, monkeypatch):
    path = measured(0).save(tmp_path / "a.csv")

    def half(self, target, **kwargs):
        Path(target).write_text("defence,st")
        raise OSError("no space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_csv", half)
    with pytest.raises(OSError, match="no space left"):
        measured(1).save(path)
    assert_frame_equal(Result.load(path).frame, measured(0).frame)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["a.csv", "a.json"]


def test_save_does_not_take_a_folder_away(tmp_path):
    (tmp_path / "a.csv").mkdir()
    (tmp_path / "a.csv" / "precious").touch()
    with pytest.raises(KitError):
        measured().save(tmp_path / "a.csv")
    assert (tmp_path / "a.csv" / "precious").exists()


@pytest.mark.parametrize("name", ["a.parquet", "a.csv", "a.txt"])
def test_loading_what_save_did_not_write_names_the_file(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(KitError, match=name):
        Result.load(tmp_path / name)


# "None" and "NA" are answers, not gaps.
@pytest.mark.parametrize("words", ["None", "NA", "null", "nan"])
def test_csv_keeps_words_that_look_like_gaps(tmp_path, words):
    path = Result(pd.DataFrame({"answer": ["a", words]})).save(tmp_path / "a.csv")
    assert list(Result.load(path).frame["answer"]) == ["a", words]


# The curves of a defence have no attack, and a diverged loss no number.
@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_gap_is_still_a_gap(tmp_path, kind):
    frame = pd.DataFrame({"attack": [None, "small"], "value": [0.5, np.nan]})
    found = Result.load(Result(frame).save(tmp_path / f"a.{kind}")).frame
    assert found.isna().to_numpy().tolist() == [[True, False], [False, True]]


# --- The front door ---


def test_importing_the_kit_is_instant():
    code = "import time as t; s = t.perf_counter(); import repnoise_kit; print(t.perf_counter()-s)"
    assert min(float(in_fresh_python(code)) for _ in range(3)) < 0.5


@pytest.fixture(scope="module")
def fresh_kit():
    return in_fresh_python("import repnoise_kit, sys; print(*sys.modules)").split()


@pytest.mark.parametrize("heavy", ["torch", "transformers", "pandas", "matplotlib"])
def test_importing_the_kit_loads_nothing_heavy(fresh_kit, heavy):
    assert heavy not in fresh_kit


def test_dir_holds_every_public_name():
    assert set(rk.__all__) <= set(dir(rk))


def test_every_public_name_resolves():
    missing = [name for name in rk.__all__ if getattr(rk, name, None) is None]
    assert not missing


def test_a_public_name_is_the_one_of_its_room():
    assert (rk.Result, rk.stack, rk.KitError) == (Result, stack, KitError)


def test_an_unknown_name_is_refused_by_name():
    with pytest.raises(AttributeError, match="no attribute 'defend'"):
        _ = rk.defend
