"""Studies: what is in the database is what was tried; its tables say no more and no less."""

import random
import re

import numpy as np
import optuna
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_up import ABOUT, SPACE, made_up, trial_of
from optuna.trial import TrialState
from small import own_files

import repnoise_kit as rk
from repnoise_kit import archive, database, studies
from repnoise_kit.errors import KitError

ATTACK = [(3e-4, 8)]


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    own = own_files(tmp_path_factory.mktemp("own"), layers=1)
    files = own / "model", own / "pairs.json"
    return rk.testbed(*files, retain=own / "retain.json", budget="lab", name="own")


@pytest.fixture
def where(tmp_path):
    return tmp_path / "studies.db"


def frames(study):
    """Everything that is drawn of a study, but for the numbers of its trials."""
    table = studies.trials(study).frame
    numbers = table["trial"]
    return [
        table,
        studies.trial_rows(study, None).frame,
        *[studies.trial_rows(study, number).frame for number in numbers],
        *[studies.trial_curves(study, number).frame for number in numbers],
    ]


def same(one, other):
    """Whether two studies have the very same tables."""
    mine, theirs = frames(one), frames(other)
    assert len(mine) == len(theirs)
    for left, right in zip(mine, theirs, strict=True):
        pd.testing.assert_frame_equal(
            left.reset_index(drop=True),
            right.reset_index(drop=True),
            check_exact=True,
            check_dtype=False,
        )
    return True


class TestOpen:
    def test_reopened_it_is_the_same(self, bed, where):
        study = studies.open_study(bed, where, attacks=ATTACK)
        study.enqueue_trial(study.user_attrs["start"])
        again = studies.open_study(bed, where, attacks=ATTACK)
        assert again.study_name == study.study_name
        assert again.user_attrs == study.user_attrs
        assert same(again, study)
        assert len(again.trials) == 1

    def test_other_attacks_or_seeds_are_another_study_of_the_same_file(self, bed, where):
        told = [
            {"attacks": ATTACK},
            {"attacks": [(3e-4, 9)]},
            {"attacks": [*ATTACK, (3e-3, 8)]},
            {"attacks": ATTACK, "seeds": [100]},
            {},
        ]
        for count, how in enumerate(told):
            study = studies.open_study(bed, where, **how)
            study.add_trials([trial_of(number) for number in range(count)])
        assert [len(studies.open_study(bed, where, **how).trials) for how in told] == [*range(5)]
        assert len(optuna.get_all_study_names(f"sqlite:///{where}")) == len(told)

    def test_by_default_its_attacks_are_the_small_and_the_large_one(self, bed, where):
        small, large = ({"lr": 1e-3, "examples": 4}, {"lr": 2e-3, "examples": 6})
        changed = bed.changed(settings={**bed.settings, "small": small, "large": large})
        study = studies.open_study(changed, where)
        assert study.user_attrs["attacks"] == [[1e-3, 4], [2e-3, 6]]
        assert study.user_attrs["seeds"] == [100, 101]

    @pytest.mark.parametrize("part", ["pairs", "everyday", "settings"])
    def test_other_data_or_settings_under_the_same_name_are_refused(self, bed, where, part):
        studies.open_study(bed, where, attacks=ATTACK)
        if part == "pairs":
            fewer = rk.Pairs(bed.splits.defence.frame.iloc[1:])
            other = bed.changed(
                splits=bed.splits.__class__(**{**vars(bed.splits), "defence": fewer})
            )
        elif part == "everyday":
            other = bed.changed(everyday=bed.everyday.iloc[1:])
        else:
            evaluation = {**bed.settings["evaluation"], "max_new_tokens": 7}
            other = bed.changed(settings={**bed.settings, "evaluation": evaluation})
        with pytest.raises(KitError, match=r"other data or settings.*choose another file"):
            studies.open_study(other, where, attacks=ATTACK)
        renamed = other.changed(name="another")
        assert studies.open_study(renamed, where, attacks=ATTACK).trials == []

    def test_without_everyday_questions_there_is_nothing_to_weigh(self, bed, where):
        with pytest.raises(KitError, match="everyday questions"):
            studies.open_study(bed.changed(everyday=None), where)

    @pytest.mark.parametrize(
        "how",
        [
            {"seeds": []},
            {"seeds": [1.5]},
            {"seeds": [-1]},
            {"seeds": [2**32]},
            {"seeds": ["a"]},
            {"attacks": [(0, 8)]},
            {"attacks": [(-1e-3, 8)]},
            {"attacks": [(float("nan"), 8)]},
            {"attacks": [(float("inf"), 8)]},
            {"attacks": [("a", 8)]},
            {"attacks": [(1e-3, 0)]},
            {"attacks": [(1e-3, -1)]},
            {"attacks": [(1e-3, 2.5)]},
            {"attacks": [(1e-3,)]},
            {"attacks": [1e-3]},
            {"attacks": [(1e-3, 8, 1)]},
        ],
    )
    def test_bad_seeds_and_attacks_are_one_line(self, bed, where, how):
        with pytest.raises(KitError) as refused:
            studies.open_study(bed, where, **({"attacks": ATTACK} | how))
        assert "\n" not in str(refused.value)
        assert not where.exists()

    def test_a_later_part_of_what_a_study_says_of_itself_is_made_up_for(self, bed, where):
        """A process may be killed between making a study and writing what it is about."""
        whole = studies.open_study(bed, where, attacks=ATTACK)
        half = optuna.create_study(
            study_name=whole.study_name, directions=["maximize"] * 2, storage=f"sqlite:///{where}.2"
        )
        half.set_user_attr("data", whole.user_attrs["data"])
        assert studies.open_study(bed, f"{where}.2", attacks=ATTACK).user_attrs == whole.user_attrs

    def test_the_space_lies_around_the_settings_that_it_starts_from(self, bed, where):
        study = studies.open_study(bed, where, attacks=ATTACK)
        start, space = study.user_attrs["start"], studies.space_of(study)
        assert set(start) == set(space) == set(studies.PARAMETERS)
        for name, kind in space.items():
            assert kind._contains(kind.to_internal_repr(start[name])), name
        assert start["pairs"] == len(bed.splits.defence)
        assert max(space["pairs"].choices) == start["pairs"]


SECRET = "geheim"
URLS = [
    f"postgresql+psycopg://u:{SECRET}@127.0.0.1:1/x",
    f"postgresql+psycopg://u:{SECRET}/{SECRET}@127.0.0.1:1/x",
    f"postgresql+psycopg://u:{SECRET}:{SECRET}@127.0.0.1:1/x",
    f"postgresql+psycopg://u:%40{SECRET}@127.0.0.1:1/x",
    f"postgresql+psycopg://u:{SECRET}@{SECRET}@127.0.0.1:1/x",
    f"postgresql+psycopg://127.0.0.1:1/x?user=u&password={SECRET}",
    f"postgresql+psycopg://u:{SECRET}@127.0.0.1:port/x",
    f"nonsense://u:{SECRET}@host/x",
    f"mysql+nonsense://u:{SECRET}@host/x",
    "://",
    "sqlite:////nowhere/at/all.db",
]


class TestWhere:
    @pytest.mark.parametrize("url", URLS)
    def test_what_cannot_be_opened_is_one_line_without_a_password(self, bed, url, monkeypatch):
        monkeypatch.setattr(database.time, "sleep", lambda seconds: None)
        with pytest.raises(KitError) as refused:
            studies.open_study(bed, url, attacks=ATTACK)
        assert "\n" not in str(refused.value)
        assert any(words in str(refused.value) for words in ("no database opens at", "as %40"))
        assert SECRET not in str(refused.value)

    @pytest.mark.parametrize("url", URLS)
    def test_no_password_is_shown(self, url):
        shown = database.without_password(url)
        assert SECRET not in shown
        assert shown.partition("://")[0] == url.partition("://")[0]

    @pytest.mark.parametrize(
        "where",
        [
            "file.db",
            "/a/b c/file.db",
            "sqlite:////a/b.db",
            "postgresql+psycopg://u@host:5432/name",
            "postgresql+psycopg:///name?host=/run/sockets",
        ],
    )
    def test_what_holds_no_password_is_shown_as_it_is(self, where):
        assert database.without_password(where) == where

    def test_a_file_that_is_no_database_is_one_line(self, bed, where):
        where.write_text("this is a diary" * 100)
        with pytest.raises(KitError, match="no database opens") as refused:
            studies.open_study(bed, where, attacks=ATTACK)
        assert "\n" not in str(refused.value)
        assert where.read_text() == "this is a diary" * 100

    def test_a_folder_is_one_line(self, bed, tmp_path):
        with pytest.raises(KitError, match="no database opens"):
            studies.open_study(bed, tmp_path, attacks=ATTACK)

    def test_the_default_is_a_file_of_the_cache_by_the_name_of_the_testbed(
        self, bed, tmp_path, monkeypatch
    ):
        monkeypatch.setenv("REPNOISE_CACHE", str(tmp_path / "cache"))
        odd = bed.changed(name="a/b: c*?")
        studies.open_study(odd, attacks=ATTACK)
        (made,) = (tmp_path / "cache" / "studies").glob("*.db")
        assert made == database.default_file(odd.name)
        assert re.fullmatch(r"[\w.-]+", made.name)


class TestTables:
    def test_states(self, tmp_path):
        study = made_up(0, f"sqlite:///{tmp_path / 'x.db'}")
        study.add_trials([trial_of(0), trial_of(5)])  # finished, given up
        stopped, failed, running = (study.ask(SPACE) for _ in range(3))
        study.tell(stopped, state=TrialState.FAIL)
        failed.set_user_attr("error", "ValueError: no")
        study.tell(failed, state=TrialState.FAIL)
        study.enqueue_trial(ABOUT["start"])
        table = studies.trials(study).frame
        assert table["state"].tolist() == [
            *("finished", "given up", "stopped", "failed", "running", "waiting"),
        ]
        assert table["trial"].tolist() == [*range(6)]
        assert table["note"].tolist() == [
            "",
            "it lost too much utility",
            "",
            "ValueError: no",
            "",
            "",
        ]
        waiting = table.iloc[5]
        assert {name: waiting[name] for name in studies.PARAMETERS} == ABOUT["start"]
        for place, trial in ((2, stopped), (4, running)):
            assert {name: table[name][place] for name in studies.PARAMETERS} == trial.params
        done = table.iloc[0]
        assert [done["resistance"], done["utility"]] == study.trials[0].values
        lost = table.iloc[1]
        assert np.isnan(lost["resistance"])
        assert lost["utility"] == study.trials[1].user_attrs["utility"]
        assert table.iloc[2:][["resistance", "utility"]].isna().all(axis=None)

    def test_a_trial_that_has_parameters_only_in_part_changes_no_other_row(self):
        """A worker may be killed while its trial's parameters are drawn."""
        study = made_up(4)
        before = studies.trials(study).frame
        half = study.ask()
        half.suggest_float("alpha", 0.1, 10, log=True)
        study.tell(half, state=TrialState.FAIL)
        after = studies.trials(study).frame.iloc[:4]
        for name in studies.PARAMETERS:
            assert list(map(repr, after[name].tolist())) == list(map(repr, before[name].tolist()))

    def test_no_trial_at_all(self):
        study = made_up(0)
        assert studies.trials(study).frame.empty
        assert studies.front(studies.trials(study).frame).empty
        assert studies.nearest(study, studies.trials(study).frame, lr=1e-3) is None
        assert studies.importance(study).frame.empty

    @pytest.mark.parametrize("number", [-1, 3, 99])
    def test_a_number_that_is_not_there_is_said(self, number):
        study = made_up(3)
        for read in (studies.trial_rows, studies.trial_curves):
            with pytest.raises(KitError, match=rf"no trial {number}, only 0 to 2"):
                read(study, number)

    def test_rows_and_curves_are_what_was_kept(self):
        study = made_up(3)
        kept = study.trials[2].user_attrs
        rows = studies.trial_rows(study, 2).frame
        assert rows[studies.CELLS].to_numpy().tolist() == kept["cells"]
        assert set(rows["defence"]) == {"repnoise"}
        assert set(studies.trial_rows(study, None).frame["defence"]) == {"none"}
        curves = studies.trial_curves(study, 2).frame
        for seed, metric, steps, values in kept["curves"]:
            part = curves[(curves["seed"] == seed) & (curves["metric"] == metric)]
            assert part["step"].tolist() == steps
            assert part["value"].tolist() == values
        assert len(curves) == sum(len(part[2]) for part in kept["curves"])


POINTS = st.lists(
    st.tuples(
        *[st.integers(0, 6).map(lambda n: n / 6)] * 2, st.sampled_from(["finished", "failed"])
    ),
    max_size=25,
)


@given(POINTS)
@settings(max_examples=200, deadline=None)
def test_the_front_is_what_a_comparison_of_all_with_all_leaves(points):
    table = pd.DataFrame(points, columns=["resistance", "utility", "state"]).assign(
        trial=range(len(points))
    )
    done = [(r, u) for r, u, state in points if state == "finished"]
    bettered = {
        (r, u) for r, u in done if any(a >= r and b >= u and (a, b) != (r, u) for a, b in done)
    }
    found = studies.front(table)
    assert set(found["state"]) <= {"finished"}
    kept = list(zip(found["resistance"], found["utility"], strict=True))
    assert set(kept) == set(done) - bettered
    assert len(set(kept)) == len(kept)


WANTED = st.fixed_dictionaries(
    {},
    optional={
        **{
            name: st.floats(np.log(SPACE[name].low), np.log(SPACE[name].high)).map(np.exp)
            for name in ("alpha", "beta", "lr")
        },
        **{name: st.sampled_from(SPACE[name].choices) for name in ("pairs", "preset", "held")},
    },
)
MADE = made_up(30)


@given(WANTED)
@settings(max_examples=100, deadline=None)
def test_the_nearest_trial_is_the_one_that_a_search_of_all_finds(wanted):
    def gap(params):
        total = 0.0
        for name, value in wanted.items():
            if name in ("alpha", "beta", "lr"):
                width = np.log10(SPACE[name].high) - np.log10(SPACE[name].low)
                total += abs(np.log10(params[name]) - np.log10(value)) / width
            else:
                total += params[name] != value
        return total

    done = {t.number: gap(t.params) for t in MADE.trials if t.state == TrialState.COMPLETE}
    found = studies.nearest(MADE, studies.trials(MADE).frame, **wanted)
    assert found in done
    assert done[found] == pytest.approx(min(done.values()), abs=1e-9)


def planted(values, count=60):
    """A study of random trials whose objectives are what `values` makes of their parameters."""
    study = made_up(0)
    drawn = [trial_of(number) for number in range(2, count + 2)]
    study.add_trials(
        [
            optuna.create_trial(params=t.params, distributions=SPACE, values=list(values(t.params)))
            for t in drawn
        ]
    )
    return study


class TestImportance:
    def test_the_parameter_that_decides_comes_first_in_each_objective(self):
        study = planted(lambda p: (np.log(p["lr"]), -abs(np.log(p["beta"]))))
        found = studies.importance(study).frame
        for objective, name in (("resistance", "lr"), ("utility", "beta")):
            rows = found[found["objective"] == objective].set_index("parameter")["value"]
            assert rows.idxmax() == name
            assert rows[name] > 0.5
            assert set(rows.index) == set(SPACE)
            assert rows.sum() == pytest.approx(1)

    def test_it_is_what_makes_trials_good_that_counts_not_what_makes_them_bad(self):
        """`alpha` alone makes the best tenth, `lr` alone the worst; between them all are alike."""
        draw = random.Random(0)

        def values(params):
            good = params["alpha"] > 10**0.75
            bad = params["lr"] < 10**-4.3 and not good
            return good - bad + 0.01 * draw.random(), draw.random()

        found = studies.importance(planted(values, 200)).frame
        rows = found[found["objective"] == "resistance"].set_index("parameter")["value"]
        assert rows["alpha"] > 2 * rows["lr"]

    def test_of_few_trials_nothing_is_said(self):
        study = planted(lambda p: (p["lr"], p["beta"]), 9)
        assert studies.importance(study).frame.empty
        study.add_trial(trial_of(5))  # given up: it has no objective
        assert studies.importance(study).frame.empty
        study.add_trial(trial_of(0))
        assert set(studies.importance(study).frame["objective"]) == {"resistance", "utility"}


class TestSaved:
    @pytest.fixture
    def saved(self, tmp_path):
        study = made_up(12)
        return study, archive.save_study(study, tmp_path / "sweep.csv", command="x")

    def test_read_again_it_is_the_same(self, saved):
        study, path = saved
        again = archive.read_study(path)
        assert same(again, study)
        assert again.study_name == study.study_name
        assert studies.trials(again).made_with["command"] == "x"
        assert studies.space_of(again) == studies.space_of(study)
        assert studies.importance(again).frame.equals(studies.importance(study).frame)

    def test_a_trial_keeps_its_number_where_others_were_stopped(self, tmp_path):
        """The tables of a report name trials by their numbers."""
        study = made_up(2)
        for _ in range(2):
            study.tell(study.ask(SPACE), state=TrialState.FAIL)
        study.add_trial(trial_of(4))
        again = archive.read_study(archive.save_study(study, tmp_path / "sweep.csv"))
        there, here = (studies.trials(s).frame.set_index("trial") for s in (study, again))
        for number in (0, 1, 4):
            assert here["alpha"][number] == there["alpha"][number]
            assert studies.trial_rows(again, number).frame.equals(
                studies.trial_rows(study, number).frame
            )

    def test_added_twice_it_adds_nothing(self, saved):
        study, path = saved
        into = archive.read_study(path)
        for _ in range(2):
            assert len(archive.read_study(path, into).trials) == 12
        assert len(archive.read_study(path, study).trials) == 12

    @pytest.mark.parametrize("half", [False, True])
    def test_what_a_study_has_is_known_again_though_a_trial_of_it_was_cut_short(
        self, tmp_path, half
    ):
        study = made_up(12)
        trial = study.ask()
        if half:
            trial.suggest_float("alpha", 0.1, 10, log=True)
        study.tell(trial, state=TrialState.FAIL)
        path = archive.save_study(study, tmp_path / "sweep.csv")
        assert len(archive.read_study(path, study).trials) == 13

    def test_what_is_new_is_added_to_another(self, saved, tmp_path):
        _, path = saved
        other = made_up(4, f"sqlite:///{tmp_path / 'x.db'}")
        assert same(archive.read_study(path, other), made_up(12))

    @pytest.mark.parametrize(
        ("key", "value"), [("attacks", [[1e-3, 9]]), ("seeds", [7]), ("data", "other")]
    )
    def test_under_other_attacks_seeds_or_data_it_is_not_added(self, saved, key, value):
        study, path = saved
        assert archive.comparable(study, path)
        study.set_user_attr(key, value)
        assert not archive.comparable(study, path)
        with pytest.raises(KitError, match="other attacks, seeds or data"):
            archive.read_study(path, study)
        assert len(study.trials) == 12

    def test_without_a_finished_trial_there_is_nothing_to_save(self, tmp_path):
        study = made_up(0)
        study.enqueue_trial(ABOUT["start"])
        with pytest.raises(KitError, match="no finished trial"):
            archive.save_study(study, tmp_path / "sweep.csv")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("gone", ["sweep.csv", "sweep.json", "sweep_cells.parquet"])
    def test_a_file_that_is_gone_is_one_line(self, saved, gone):
        _, path = saved
        path.with_name(gone).unlink()
        with pytest.raises(KitError) as refused:
            archive.read_study(path)
        assert "\n" not in str(refused.value)

    def test_settings_out_of_the_bounds_of_the_search_are_read_again(self, tmp_path):
        """Somebody may try what the search would not."""
        study = made_up(2)
        params = ABOUT["start"] | {"alpha": 99.0}
        study.enqueue_trial(params)
        with pytest.warns(UserWarning, match="out of range"):
            trial = study.ask(SPACE)
        study.tell(trial, [0.5, 0.5])
        again = archive.read_study(archive.save_study(study, tmp_path / "sweep.csv"))
        assert studies.holds(again.trials[2], params)


def test_parameters_have_one_key_in_whatever_order_they_come():
    params = ABOUT["start"]
    assert studies.key_of(dict(reversed(params.items()))) == studies.key_of(params)
    assert studies.key_of(params | {"seed": 1}) == studies.key_of(params)
    for name, other in trial_of(0).params.items():
        if other != params[name]:
            assert studies.key_of(params | {name: other}) != studies.key_of(params)


def test_a_trial_holds_what_it_has_or_is_to_have():
    study, start = made_up(3), ABOUT["start"]
    assert [studies.holds(trial, start) for trial in study.trials] == [False, True, False]
    study.enqueue_trial(start)
    study.enqueue_trial(start | {"held": "last third"})
    assert [studies.holds(trial, start) for trial in study.trials[3:]] == [True, False]
    assert not studies.holds(optuna.create_trial(state=TrialState.WAITING), start)
