"""A panel to sweep RepNoise by hand: the only room that knows ipywidgets.

Sliders choose among the trials of a study, and draw what is known of them; buttons run what is not
known yet. Training happens in a process of its own, which writes to the study as it goes: the panel
may be closed, or its kernel started again, and nothing that is finished is lost.
"""

import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from html import escape
from math import log10
from pathlib import Path
from typing import Any

import ipywidgets as w
import optuna
import pandas as pd
from optuna.distributions import CategoricalDistribution, FloatDistribution

from repnoise_kit.archive import comparable, read_study
from repnoise_kit.errors import KitError
from repnoise_kit.overview import SHOWS, draw, png
from repnoise_kit.progress import Progress
from repnoise_kit.resistance import budgets
from repnoise_kit.search import Errand, Worker
from repnoise_kit.studies import (
    SEEDS,
    key_of,
    space_of,
    trials,
)
from repnoise_kit.testbeds import Testbed

EVERY = 1.5
"""Seconds between two drawings of a training as it runs."""

TERMS = ("retain", "noise", "ascent")
MOST = 2000
"""Steps of a running training that are held to be drawn; of a longer one, every second."""

LABELS = {
    "alpha": "alpha (ascent)",
    "beta": "beta (noise)",
    "lr": "learning rate",
    "pairs": "pairs",
    "preset": "preset",
    "held": "layers held",
}
NEAREST = -1
_NEAREST = ("nearest to the sliders", NEAREST)
_WIDE = w.Layout(width="272px")
_STYLE = {"description_width": "100px"}


def sweep(
    bed: Testbed,
    study: str | Path | None = None,
    *,
    known: str | Path | None = None,
    attacks: Sequence[tuple[float, int]] | None = None,
    seeds: Sequence[int] = SEEDS,
    store: str | Path | None = None,
) -> "Panel":
    """Return a panel to look at a study's trials and to run new ones.

    Args:
        bed: The testbed that trials are of.
        study: A file or a database's URL, as `open_study` takes it; by default a file in the
            kit's cache, the one that `python -m repnoise_kit sweep` uses.
        known: A study that `save_study` wrote, whose trials are put into this one first where the
            attacks and seeds are the same.
        attacks: Learning rate and number of examples of each attack; by default the small and the
            large.
        seeds: What trials are judged on.
        store: Where finished pieces of work lie, as grids have it.
    """
    _let_colab_show_it()
    return Panel(bed, Errand(bed, study, attacks, tuple(seeds), store), known)


class Panel(w.VBox):
    """What `sweep` returns; each part can be moved from Python too: `panel.alpha.value = 2`."""

    study: optuna.Study

    def __init__(self, bed: Testbed, errand: Errand, known: str | Path | None = None) -> None:
        self.bed, self.errand, self.known = bed, errand, known
        self.worker: Worker | None = None
        self.live: list[dict[str, Any]] = []
        self._drawing = threading.RLock()
        self._quiet = False
        self.study = self._opened()
        self._make_parts()
        super().__init__(self._laid_out())
        self._listen()
        self.refresh()

    def __repr__(self) -> str:
        return f"a panel over {self._counted}; it is drawn where widgets are"

    def params(self) -> dict[str, Any]:
        """Return the parameters that the sliders and menus show."""
        return {name: part.value for name, part in self.parts.items()}

    def refresh(self) -> None:
        """Read the study again, and draw."""
        with self._drawing:
            self._list_trials()
            self._draw()

    def run(self) -> None:
        """Run a trial with the parameters shown, or go on with it if it was stopped."""
        params = self.params()
        table = trials(self.study).frame
        done = table[table["state"].isin(["finished", "given up"])]
        ours = key_of(params)
        for row in done.to_dict("records"):
            if key_of(row) == ours:
                self.trial.value = row["trial"]
                self._say(f"trial {row['trial']} has these parameters already: {row['state']}")
                return
        self._start(replace(self.errand, params=params), 1)

    def search(self) -> None:
        """Run as many trials as the box says, chosen by the sampler."""
        table = trials(self.study).frame
        done = int(table["state"].isin(["finished", "given up"]).sum())
        until = done + self.count.value
        self._start(replace(self.errand, until=until), self.count.value)

    def stop(self) -> None:
        """Stop after the current step; the trial can be gone on with."""
        if self.worker is not None:
            self.worker.stop()
            self._say("stopping after this step …")

    def join(self, seconds: float | None = None) -> None:
        """Wait until what runs has ended: for scripts and tests."""
        if self._watching is not None:
            self._watching.join(seconds)

    # What it is made of ---------------------------------------------------------------------

    def _opened(self) -> optuna.Study:
        study = self.errand.study()
        if self.known is not None and comparable(study, self.known):
            read_study(self.known, into=study)
        return study

    def _make_parts(self) -> None:
        start = self.study.user_attrs["start"]
        self.parts = {
            name: _part(name, kind, start[name]) for name, kind in space_of(self.study).items()
        }
        self.alpha, self.beta, self.lr = (self.parts[name] for name in ("alpha", "beta", "lr"))
        about = self.study.user_attrs
        chosen = [tuple(attack) for attack in about["attacks"]]
        offered = sorted({*budgets(self.bed), *chosen})
        self.attacks = w.SelectMultiple(
            options=[(f"{lr:g} × {examples}", (lr, examples)) for lr, examples in offered],
            value=chosen, description="attacks", rows=3, layout=_WIDE, style=_STYLE,
        )  # fmt: skip
        self.seeds = w.Text(
            value=", ".join(map(str, about["seeds"])), description="seeds",
            continuous_update=False, layout=_WIDE, style=_STYLE,
        )  # fmt: skip
        self.trial = w.Dropdown(
            options=[_NEAREST], description="trial", layout=_WIDE,
            style=_STYLE,
        )  # fmt: skip
        self.show = w.Dropdown(options=SHOWS, description="below", layout=_WIDE, style=_STYLE)
        self.run_button = w.Button(description="Run", button_style="primary")
        self.stop_button = w.Button(description="Stop", disabled=True)
        self.search_button = w.Button(description="Search")
        self.count = w.BoundedIntText(
            value=10, min=1, max=10_000, description="trials", layout=w.Layout(width="150px"),
            style={"description_width": "45px"},
        )  # fmt: skip
        for button, words in (
            (self.run_button, "Run a trial with the parameters shown"),
            (self.stop_button, "Stop after the current step; the trial can be gone on with"),
            (self.search_button, "Let the sampler choose so many trials and run them"),
        ):
            button.tooltip = words
            button.layout.width = "90px"
        self.bar = w.FloatProgress(min=0, max=1, layout=w.Layout(width="200px"))
        self.status, self.error = w.HTML(), w.HTML()
        self.figure = w.Image(
            format="png", layout=w.Layout(align_self="flex-start", max_width="100%")
        )
        self._watching: threading.Thread | None = None

    def _laid_out(self) -> list[w.Widget]:
        left = w.VBox([self.alpha, self.beta, self.lr, self.parts["pairs"]])
        right = w.VBox([self.parts["preset"], self.parts["held"], self.trial, self.show])
        third = w.VBox([self.attacks, self.seeds])
        buttons = [self.run_button, self.stop_button, self.search_button, self.count, self.bar]
        wrapped = w.Layout(flex_flow="row wrap")
        return [
            w.HBox([left, right, third], layout=wrapped),
            w.HBox([*buttons, self.status], layout=wrapped),
            self.error,
            self.figure,
        ]

    def _listen(self) -> None:
        for part in self.parts.values():
            part.observe(lambda change: self._moved(), "value")
        self.show.observe(lambda change: self._redrawn(), "value")
        self.trial.observe(lambda change: self._chosen(), "value")
        for part in (self.attacks, self.seeds):
            part.observe(lambda change: self._judged_otherwise(), "value")
        self.run_button.on_click(lambda button: self._tried(self.run))
        self.stop_button.on_click(lambda button: self._tried(self.stop))
        self.search_button.on_click(lambda button: self._tried(self.search))

    # What happens when a part is moved -------------------------------------------------------

    def _moved(self) -> None:
        if self._quiet:
            return
        self._set(self.trial, NEAREST)
        self._tried(self._draw)

    def _redrawn(self) -> None:
        self._tried(self._draw)

    def _chosen(self) -> None:
        """Move the sliders to the trial that was chosen, so that it can be changed from there."""
        if self._quiet:
            return
        if self.trial.value != NEAREST:
            known = self.study.get_trials(deepcopy=False)[self.trial.value].params
            for name in known.keys() & self.parts.keys():
                self._set(self.parts[name], known[name])
        self._tried(self._draw)

    def _judged_otherwise(self) -> None:
        """Open the study of other attacks or seeds."""
        if not self._quiet:
            self._tried(self._reopen)

    def _reopen(self) -> None:
        try:
            seeds = tuple(int(seed) for seed in self.seeds.value.split(",") if seed.strip())
        except ValueError as error:
            raise KitError(
                f"seeds are whole numbers with commas between, not {self.seeds.value!r}"
            ) from error
        if not self.attacks.value:
            raise KitError("choose at least one attack that a trial is to hold against")
        self.errand = replace(self.errand, attacks=tuple(self.attacks.value), seeds=seeds)
        self.study = self._opened()
        self._set(self.trial, NEAREST)
        self.refresh()

    def _tried(self, act: Callable[[], None]) -> None:
        """Do something; what goes wrong is one line in the panel, which has no other voice."""
        self.error.value = ""
        try:
            act()
        except KitError as error:
            self._complain(str(error))
        except Exception as error:
            self._complain(f"{type(error).__name__}: {error}")

    # Drawing ----------------------------------------------------------------------------------

    def _draw(self) -> None:
        with self._drawing:
            number = None if self.trial.value == NEAREST else self.trial.value
            wanted = self.params() if number is None else {}
            live = None
            if self.live:
                live = pd.DataFrame(self.live).melt(["seed", "step"], var_name="metric")
            figure = draw(self.study, trial=number, show=self.show.value, live=live, **wanted)
            self.figure.value = png(figure)

    def _list_trials(self) -> None:
        table = trials(self.study).frame
        counts = table["state"].value_counts()
        counted = ", ".join(f"{count} {state}" for state, count in counts.items())
        self._counted = counted or "no trial yet"
        rows = table[table["state"].isin(["finished", "given up", "stopped"])]
        rows = rows.assign(last=rows["state"] == "stopped")
        rows = rows.sort_values(["last", "resistance"], ascending=[True, False], kind="stable")
        options, listed = [_NEAREST], set()
        for row in rows.to_dict("records"):
            words = f"{row['trial']}: {row['state']}"
            if row["state"] == "finished":
                words = f"{row['trial']}: {row['resistance']:.2f}, utility {row['utility']:.2f}"
            if row["state"] != "stopped" or key_of(row) not in listed:
                options.append((words, row["trial"]))
            listed.add(key_of(row))
        before, self._quiet = self.trial.value, True
        self.trial.options = options
        self.trial.value = before if before in dict(options).values() else NEAREST
        self._quiet = False
        if self.worker is None:
            self._say(self._counted)

    def _set(self, part: Any, value: Any) -> None:
        self._quiet = True
        part.value = value
        self._quiet = False

    def _say(self, words: str) -> None:
        self.status.value = f"<span>{escape(words)}</span>"

    def _complain(self, words: str) -> None:
        self.error.value = f"<b style='color:#a00' role='alert'>{escape(words)}</b>"

    # Running ----------------------------------------------------------------------------------

    def _start(self, errand: Errand, count: int) -> None:
        if self.worker is not None:
            raise KitError("something runs already; stop it first, or wait")
        self.worker = Worker(errand)
        self.live, self.bar.value = [], 0.0
        self._say("starting …")
        self._switch(running=True)
        self._watching = threading.Thread(target=self._watch, args=(self.worker, count))
        self._watching.daemon = True
        self._watching.start()

    def _switch(self, *, running: bool) -> None:
        self.run_button.disabled = self.search_button.disabled = running
        self.attacks.disabled = self.seeds.disabled = running
        self.stop_button.disabled = not running

    def _watch(self, worker: Worker, count: int) -> None:
        """Show what a worker tells until it has ended."""
        told = Progress(count)
        self._tried(lambda: self._follow(worker, told))
        worker.join()
        self.worker, self.live = None, []
        self._switch(running=False)
        self._with_error_kept(lambda: self._ended(worker.errand, told))

    def _follow(self, worker: Worker, told: Progress) -> None:
        drawn, there = time.monotonic(), True
        while there:
            there = worker.alive()
            for message in worker.heard():
                self._hear(message, told)
            if self.live and time.monotonic() - drawn > EVERY and self.show.value == "terms":
                self._draw()
                drawn = time.monotonic()
            time.sleep(0.1)

    def _hear(self, message: dict[str, Any], told: Progress) -> None:
        told.take(message)
        if "error" in message:
            self._complain(message["error"])
        if "trial" in message:
            self.live = []
        terms = message.get("terms", {})
        if "noise" in terms:
            place = {name: message[name] for name in ("seed", "step")}
            self.live.append(place | {name: terms[name] for name in TERMS})
            if len(self.live) > MOST:
                self.live = self.live[::2]
        if told.end is None and told.trial is not None:
            self.bar.value = told.share()
            self._say(f"trial {told.trial}, {told.left()}")

    def _ended(self, errand: Errand, told: Progress) -> None:
        self.refresh()
        if errand.params is not None and key_of(errand.params) == key_of(self.params()):
            states = trials(self.study).frame.set_index("trial")["state"]
            if states.get(told.trial) in ("finished", "given up"):
                self.bar.value = 1.0
                self.trial.value = told.trial
        words = {
            "stopped": "stopped; Run goes on with it. ",
            None: "the training process died (killed, or out of memory); Run goes on from there. ",
        }
        self._say(words.get(told.end, "") + self._counted)

    def _with_error_kept(self, act: Callable[[], None]) -> None:
        """Do something without wiping out what was said of an error."""
        said = self.error.value
        self._tried(act)
        self.error.value = self.error.value or said


def _part(name: str, kind: Any, value: Any) -> Any:
    """Return the slider or menu of a parameter."""
    common: dict[str, Any] = {"description": LABELS[name], "layout": _WIDE, "style": _STYLE}
    if isinstance(kind, FloatDistribution):
        return w.FloatLogSlider(
            value=value, min=log10(kind.low), max=log10(kind.high), step=0.05,
            readout_format=".2g", continuous_update=False, **common,
        )  # fmt: skip
    assert isinstance(kind, CategoricalDistribution)
    if name == "pairs":
        return w.SelectionSlider(
            options=kind.choices, value=value, continuous_update=False, **common
        )
    return w.Dropdown(options=kind.choices, value=value, **common)


def _let_colab_show_it() -> None:
    """Turn on what Colab needs where somebody put ipywidgets 8 in the place of its own 7.7."""
    if "google.colab" in sys.modules and int(w.__version__.split(".")[0]) >= 8:
        from google.colab import output  # ty: ignore[import-not-found]

        output.enable_custom_widget_manager()
