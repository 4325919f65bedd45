"""Draw results: `plot_x(result, *, ax=None, **kwargs) -> Axes`, and nothing but drawing.

A result, or a plain table of the same columns, comes first; `ax=None` means a new figure; several
panels take and return `axes=`. Nothing here shows, saves, fits, or sets a style.
"""

from repnoise_kit.plots.attacks import (
    plot_budgets,
    plot_cost_to_break,
    plot_metric,
    plot_price,
    plot_questions,
    plot_resistance,
)
from repnoise_kit.plots.criteria import (
    plot_criteria,
    plot_learning,
    plot_samples,
    plot_withheld,
)
from repnoise_kit.plots.depth import (
    plot_attack_path,
    plot_attack_plane,
    plot_freezing,
    plot_layers,
    plot_weight_distance,
)
from repnoise_kit.plots.inside import (
    plot_cka,
    plot_densities,
    plot_logit_mass,
    plot_noise_test,
    plot_pca,
    plot_probe,
)
from repnoise_kit.plots.sweep import plot_front, plot_importance, plot_slices, plot_trial
from repnoise_kit.plots.training import plot_terms

__all__ = [
    "plot_attack_path",
    "plot_attack_plane",
    "plot_budgets",
    "plot_cka",
    "plot_cost_to_break",
    "plot_criteria",
    "plot_densities",
    "plot_freezing",
    "plot_front",
    "plot_importance",
    "plot_layers",
    "plot_learning",
    "plot_logit_mass",
    "plot_metric",
    "plot_noise_test",
    "plot_pca",
    "plot_price",
    "plot_probe",
    "plot_questions",
    "plot_resistance",
    "plot_samples",
    "plot_slices",
    "plot_terms",
    "plot_trial",
    "plot_weight_distance",
    "plot_withheld",
]
