"""What is read of each immunization criterion: a handful of numbers with their intervals."""

import pandas as pd

from repnoise_kit.results import Result, need
from repnoise_kit.stats import difference, summary

CRITERIA = ("resistance", "stability", "generalization", "trainability")

HEADLINES = {
    "resistance": ("recall", "harmfulness"),
    "stability": ("recall", "perplexity", "refusal"),
    "generalization": ("recall", "harmfulness"),
    "trainability": ("rouge1", "exact"),
}
"""What is read of each criterion: of attacks a mean over their budgets, of withheld categories and
of tasks a mean over all their questions, of what was learned the end."""


def criteria_headlines(rows: Result | pd.DataFrame) -> pd.DataFrame:
    """Return the numbers that are read of each criterion, one row a question and seed.

    Args:
        rows: What `criteria` returns.

    Returns:
        `criterion, defence, metric, value, seed, prompt`: the mean over budgets, categories and
        tasks; perplexity as its logarithm is averaged by `summary`.
    """
    frame = need(rows.frame if isinstance(rows, Result) else rows, "criterion", "defence", "metric")
    found = []
    for criterion, metrics in HEADLINES.items():
        part = frame[(frame["criterion"] == criterion) & frame["metric"].isin(metrics)]
        if part.empty:  # The testbed had no way to measure it.
            continue
        if criterion == "resistance":
            part = part[(part["examples"] > 0) & (part["group"] == "seen")]
        if criterion == "generalization":
            # Beside a defence that saw the rest stands itself, having seen all, as a control; what
            # trains on nothing has only that one. And a half is no category.
            taught = part.loc[part["saw"] == "the rest", "defence"].unique()
            wanted = (part["saw"] == "the rest") | ~part["defence"].isin(taught)
            several = part["withheld"].nunique() > 1
            part = part[wanted & ((part["withheld"] != "half") | (not several))]
        if criterion == "trainability":
            part = part[part["stage"] == "learning"]
            part = part[part["step"] == part.groupby("task")["step"].transform("max")]
        keys = ["criterion", "defence", "metric", "seed", "prompt"]
        found.append(part.groupby(keys, sort=False, as_index=False)["value"].mean())
    return pd.concat(found, ignore_index=True)


def criteria_table(rows: Result | pd.DataFrame) -> pd.DataFrame:
    """Return each headline with its interval: `criterion, defence, metric, value, low, high, n`."""
    cells = summary(criteria_headlines(rows), by=("criterion", "defence", "metric"))
    pooled = cells["seed"] == "all"
    return (cells[pooled] if pooled.any() else cells).reset_index(drop=True)


def criteria_differences(rows: Result | pd.DataFrame) -> pd.DataFrame:
    """Return each defence minus the undefended model, paired by seed and question.

    Returns:
        `criterion, metric, defence, value, low, high`.
    """
    found = []
    numbers = criteria_headlines(rows)
    for _, part in numbers.groupby(["criterion", "metric"], sort=False):
        for name in part["defence"].unique():
            if name != "none":
                gap = difference(part, {"defence": name}, {"defence": "none"})
                keys = part[["criterion", "metric"]].iloc[0].to_dict() | {"defence": name}
                found.append(keys | gap._asdict())
    return pd.DataFrame(found)
