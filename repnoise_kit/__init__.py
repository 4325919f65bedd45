"""Representation Noising: train the defence, attack it, look inside, on a laptop or a GPU."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives. Rooms load on first use, so that importing the kit is instant and
# its plots need no torch.
_ROOMS = {
    "errors": ("KitError",),
    "results": ("Result", "committed", "stack"),
    "stats": (
        "Interval", "compare_cells", "difference", "holm", "interval", "p_value", "summary",
        "verdict",
    ),
    "survival": ("cost_ratios", "cost_to_break"),
    "headlines": ("criteria_differences", "criteria_headlines", "criteria_table"),
    "agreeing": ("agreement",),
    "paper": (),
    "style": ("clean_style",),
    "pairs": ("Pairs", "load_answers", "load_pairs"),
    "splits": ("Splits", "split"),
    "tasks": ("Task",),
    "corpora": ("beavertails_rows", "decoding_trust_rows", "gem_task"),
    "model": ("load_model",),
    "anatomy": ("frozen", "name_parts_"),
    "recording": ("record",),
    "losses": ("lens_ce", "masked_ce", "mmd"),
    "knobs": ("PRESETS",),
    "training": ("train_",),
    "labelled": ("local_classifier",),
    "judges": (
        "beavertails_classifier", "hub_classifier", "judge", "toxicity_classifier",
    ),
    "testbeds": ("Testbed", "lab", "testbed"),
    "repnoise": ("RepNoiseLoss", "repnoise_loss"),
    "security": ("guarded",),
    "defences": ("DEFENCES", "defend_"),
    "attacks": ("attack_",),
    "evaluation": ("evaluate",),
    "harness": ("PAPER_TASKS", "benchmarks"),
    "refusals": ("make_refusals",),
    "presets": ("beavertails", "decoding_trust"),
    "saving": ("save_model",),
    "bench": ("Bench",),
    "grid": (),
    "tuning": (),
    "resistance": ("resistance_grid",),
    "cost": ("cost_grid",),
    "everyday": ("stability",),
    "generalization": ("generalization_grid", "samples_grid"),
    "trainability": ("learn_", "trainability_grid"),
    "immunization": ("criteria",),
    "released": ("before_and_after",),
    "freezing": ("ablate_layers", "thirds", "weight_distance"),
    "lens": ("layer_log_probs", "logit_mass"),
    "activations": ("Activations", "answer_activations"),
    "geometry": ("cka", "fit_pca", "linear_cka", "noise_test", "pca"),
    "probes": ("probe",),
    "descent": ("attack_path", "attack_paths", "attack_plane"),
    "studies": (
        "front", "importance", "open_study", "trial_curves", "trial_rows", "trials",
    ),
    "archive": ("read_study", "save_study"),
    "search": ("search_settings",),
    "choosing": ("report_trials", "winner"),
    "widgets": (),
    "walkthrough": ("copy_notebooks",),
    "plots": (
        "plot_attack_path", "plot_attack_plane", "plot_budgets", "plot_cka",
        "plot_cost_to_break", "plot_criteria", "plot_densities", "plot_freezing", "plot_front",
        "plot_importance", "plot_layers", "plot_learning", "plot_logit_mass", "plot_metric",
        "plot_noise_test", "plot_pca", "plot_price", "plot_probe", "plot_questions",
        "plot_resistance", "plot_samples", "plot_slices", "plot_terms", "plot_trial",
        "plot_weight_distance", "plot_withheld",
    ),
    "overview": ("draw",),
}  # fmt: skip
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if TYPE_CHECKING:
    from repnoise_kit.activations import Activations as Activations
    from repnoise_kit.activations import answer_activations as answer_activations
    from repnoise_kit.agreeing import agreement as agreement
    from repnoise_kit.anatomy import frozen as frozen
    from repnoise_kit.anatomy import name_parts_ as name_parts_
    from repnoise_kit.archive import read_study as read_study
    from repnoise_kit.archive import save_study as save_study
    from repnoise_kit.attacks import attack_ as attack_
    from repnoise_kit.bench import Bench as Bench
    from repnoise_kit.choosing import report_trials as report_trials
    from repnoise_kit.choosing import winner as winner
    from repnoise_kit.corpora import beavertails_rows as beavertails_rows
    from repnoise_kit.corpora import decoding_trust_rows as decoding_trust_rows
    from repnoise_kit.corpora import gem_task as gem_task
    from repnoise_kit.cost import cost_grid as cost_grid
    from repnoise_kit.defences import DEFENCES as DEFENCES
    from repnoise_kit.defences import defend_ as defend_
    from repnoise_kit.descent import attack_path as attack_path
    from repnoise_kit.descent import attack_paths as attack_paths
    from repnoise_kit.descent import attack_plane as attack_plane
    from repnoise_kit.errors import KitError as KitError
    from repnoise_kit.evaluation import evaluate as evaluate
    from repnoise_kit.everyday import stability as stability
    from repnoise_kit.freezing import ablate_layers as ablate_layers
    from repnoise_kit.freezing import thirds as thirds
    from repnoise_kit.freezing import weight_distance as weight_distance
    from repnoise_kit.generalization import generalization_grid as generalization_grid
    from repnoise_kit.generalization import samples_grid as samples_grid
    from repnoise_kit.geometry import cka as cka
    from repnoise_kit.geometry import fit_pca as fit_pca
    from repnoise_kit.geometry import linear_cka as linear_cka
    from repnoise_kit.geometry import noise_test as noise_test
    from repnoise_kit.geometry import pca as pca
    from repnoise_kit.harness import PAPER_TASKS as PAPER_TASKS
    from repnoise_kit.harness import benchmarks as benchmarks
    from repnoise_kit.headlines import criteria_differences as criteria_differences
    from repnoise_kit.headlines import criteria_headlines as criteria_headlines
    from repnoise_kit.headlines import criteria_table as criteria_table
    from repnoise_kit.immunization import criteria as criteria
    from repnoise_kit.judges import beavertails_classifier as beavertails_classifier
    from repnoise_kit.judges import hub_classifier as hub_classifier
    from repnoise_kit.judges import judge as judge
    from repnoise_kit.judges import toxicity_classifier as toxicity_classifier
    from repnoise_kit.knobs import PRESETS as PRESETS
    from repnoise_kit.labelled import local_classifier as local_classifier
    from repnoise_kit.lens import layer_log_probs as layer_log_probs
    from repnoise_kit.lens import logit_mass as logit_mass
    from repnoise_kit.losses import lens_ce as lens_ce
    from repnoise_kit.losses import masked_ce as masked_ce
    from repnoise_kit.losses import mmd as mmd
    from repnoise_kit.model import load_model as load_model
    from repnoise_kit.overview import draw as draw
    from repnoise_kit.pairs import Pairs as Pairs
    from repnoise_kit.pairs import load_answers as load_answers
    from repnoise_kit.pairs import load_pairs as load_pairs
    from repnoise_kit.plots import plot_attack_path as plot_attack_path
    from repnoise_kit.plots import plot_attack_plane as plot_attack_plane
    from repnoise_kit.plots import plot_budgets as plot_budgets
    from repnoise_kit.plots import plot_cka as plot_cka
    from repnoise_kit.plots import plot_cost_to_break as plot_cost_to_break
    from repnoise_kit.plots import plot_criteria as plot_criteria
    from repnoise_kit.plots import plot_densities as plot_densities
    from repnoise_kit.plots import plot_freezing as plot_freezing
    from repnoise_kit.plots import plot_front as plot_front
    from repnoise_kit.plots import plot_importance as plot_importance
    from repnoise_kit.plots import plot_layers as plot_layers
    from repnoise_kit.plots import plot_learning as plot_learning
    from repnoise_kit.plots import plot_logit_mass as plot_logit_mass
    from repnoise_kit.plots import plot_metric as plot_metric
    from repnoise_kit.plots import plot_noise_test as plot_noise_test
    from repnoise_kit.plots import plot_pca as plot_pca
    from repnoise_kit.plots import plot_price as plot_price
    from repnoise_kit.plots import plot_probe as plot_probe
    from repnoise_kit.plots import plot_questions as plot_questions
    from repnoise_kit.plots import plot_resistance as plot_resistance
    from repnoise_kit.plots import plot_samples as plot_samples
    from repnoise_kit.plots import plot_slices as plot_slices
    from repnoise_kit.plots import plot_terms as plot_terms
    from repnoise_kit.plots import plot_trial as plot_trial
    from repnoise_kit.plots import plot_weight_distance as plot_weight_distance
    from repnoise_kit.plots import plot_withheld as plot_withheld
    from repnoise_kit.presets import beavertails as beavertails
    from repnoise_kit.presets import decoding_trust as decoding_trust
    from repnoise_kit.probes import probe as probe
    from repnoise_kit.recording import record as record
    from repnoise_kit.refusals import make_refusals as make_refusals
    from repnoise_kit.released import before_and_after as before_and_after
    from repnoise_kit.repnoise import RepNoiseLoss as RepNoiseLoss
    from repnoise_kit.repnoise import repnoise_loss as repnoise_loss
    from repnoise_kit.resistance import resistance_grid as resistance_grid
    from repnoise_kit.results import Result as Result
    from repnoise_kit.results import committed as committed
    from repnoise_kit.results import stack as stack
    from repnoise_kit.saving import save_model as save_model
    from repnoise_kit.search import search_settings as search_settings
    from repnoise_kit.security import guarded as guarded
    from repnoise_kit.splits import Splits as Splits
    from repnoise_kit.splits import split as split
    from repnoise_kit.stats import Interval as Interval
    from repnoise_kit.stats import compare_cells as compare_cells
    from repnoise_kit.stats import difference as difference
    from repnoise_kit.stats import holm as holm
    from repnoise_kit.stats import interval as interval
    from repnoise_kit.stats import p_value as p_value
    from repnoise_kit.stats import summary as summary
    from repnoise_kit.stats import verdict as verdict
    from repnoise_kit.studies import front as front
    from repnoise_kit.studies import importance as importance
    from repnoise_kit.studies import open_study as open_study
    from repnoise_kit.studies import trial_curves as trial_curves
    from repnoise_kit.studies import trial_rows as trial_rows
    from repnoise_kit.studies import trials as trials
    from repnoise_kit.style import clean_style as clean_style
    from repnoise_kit.survival import cost_ratios as cost_ratios
    from repnoise_kit.survival import cost_to_break as cost_to_break
    from repnoise_kit.tasks import Task as Task
    from repnoise_kit.testbeds import Testbed as Testbed
    from repnoise_kit.testbeds import lab as lab
    from repnoise_kit.testbeds import testbed as testbed
    from repnoise_kit.trainability import learn_ as learn_
    from repnoise_kit.trainability import trainability_grid as trainability_grid
    from repnoise_kit.training import train_ as train_
    from repnoise_kit.walkthrough import copy_notebooks as copy_notebooks
