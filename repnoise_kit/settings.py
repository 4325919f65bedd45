"""What defences, attacks and evaluation start from: the paper's numbers, and the lab's."""

from collections.abc import Mapping
from typing import Any

from repnoise_kit.errors import KitError, check_numbers, check_whole
from repnoise_kit.splits import Splits

# What differs in the lab from the paper: a small model learns with larger steps, and at this size
# a noise weight of 0.001 does nothing.
LAB_SETTINGS = {
    "defence": {"lr": 3e-4, "alpha": 1.0, "beta": 1.0, "examples": None, "batch_size": 8},
    "attack": {"lr": 3e-4, "examples": 512, "batch_size": 8},
    "small": {"examples": 64},
    "large": {"examples": 512},
    # Ten times the paper's learning rates. Fixed by the undefended model alone, on seeds that are
    # not reported: it gives away more than half at each; at 1e-4, 64 examples did not undo it.
    "resistance": {"lr": (3e-4, 6e-4, 8e-4), "examples": (64, 512)},
    "evaluation": {"max_new_tokens": 24, "batch_size": 64},
    # The largest budget of an attack, as the paper's: the undefended model then learns each task.
    "trainability": {"lr": 8e-4, "examples": 512, "batch_size": 8},
    # The paper's own for security vectors; for the others those that `tuning` chose.
    "security_vectors": {"lr": 1e-3, "rank": 8},
    "safety_training": {"lr": 1e-3},
    "gradient_ascent": {"lr": 3e-6},
    "adversarial_loss": {"lr": 3e-4, "weight": 0.1},
    "vaccine": {"lr": 1e-3, "rho": 1.0},
}

# Section 4 and Appendix B of the paper; sizes are the most a file may hold.
PAPER_SETTINGS: dict[str, dict[str, Any]] = {
    "defence": {
        "lr": 2e-5, "alpha": 1.0, "beta": 0.001, "examples": 10_000, "batch_size": 8,
        "max_length": 128,
    },
    "attack": {"lr": 3e-5, "examples": 1_000, "batch_size": 4},
    "small": {"lr": 3e-5, "examples": 1_000},
    "large": {"lr": 8e-5, "examples": 10_000},
    "resistance": {"lr": (3e-5, 6e-5, 8e-5), "examples": (1_000, 10_000)},
    "evaluation": {"max_new_tokens": 50, "batch_size": 8},
    "trainability": {"lr": 8e-5, "examples": None, "batch_size": 4},
    "security_vectors": {"lr": 1e-3, "rank": 8},
    "adversarial_loss": {"lr": 1e-5, "weight": 0.1},
    "vaccine": {"rho": 1.0},
}  # fmt: skip

BUDGETS = {
    "paper": PAPER_SETTINGS,
    # Table 2: few pairs, seen four times by defence and attack alike.
    "toxicity": PAPER_SETTINGS | {
        "defence": {
            "lr": 2e-5, "alpha": 2.0, "beta": 4.0, "examples": 351, "batch_size": 8, "epochs": 4,
            "max_length": 128,
        },
        "attack": {"lr": 3e-5, "examples": 351, "batch_size": 4, "epochs": 4},
        "small": {"lr": 3e-5, "examples": 351},
        "large": {"lr": 8e-5, "examples": 351},
        "resistance": {"lr": (3e-5, 6e-5, 8e-5), "examples": (351,)},
        "evaluation": {"max_new_tokens": 25, "batch_size": 8},
    },
    "lab": LAB_SETTINGS,
}  # fmt: skip
"""What a testbed starts from, by name: of the paper on BeaverTails and on toxicity, of the lab."""


def chosen_settings(
    splits: Splits,
    budget: str,
    *,
    lora: int | None,
    gradient_checkpointing: bool,
    accumulation: int,
) -> dict[str, dict[str, Any]]:
    """Return the settings of a budget, for these splits and with these savings of memory.

    Raises:
        KitError: one of the three is out of its range.
    """
    if lora is not None:
        check_whole(lora=lora)
        check_numbers(above_zero=True, lora=lora)
    check_whole(accumulation=accumulation)
    check_numbers(above_zero=True, accumulation=accumulation)
    saved = {"lora": lora, "gradient_checkpointing": gradient_checkpointing}
    settings = capped(BUDGETS[budget], splits)
    for name in ("defence", "attack", "trainability"):
        batch = settings[name]["batch_size"]
        if batch % accumulation:
            raise KitError(
                f"accumulation={accumulation} does not divide a batch of {batch} ({name}, budget "
                f"{budget!r}); give a divisor of it"
            )
        settings[name] |= saved | {"accumulation": accumulation}
    return settings


def capped(chosen: Mapping[str, Mapping[str, Any]], splits: Splits) -> dict[str, dict[str, Any]]:
    """Return settings with no more examples than there are."""
    settings = {name: dict(values) for name, values in chosen.items()}
    sizes = {name: len(splits.attack) for name in ("attack", "small", "large", "resistance")}
    for name, most in (sizes | {"defence": len(splits.defence)}).items():
        wanted = settings[name]["examples"]
        if isinstance(wanted, tuple):
            settings[name]["examples"] = tuple(dict.fromkeys(min(size, most) for size in wanted))
        elif wanted is not None:
            settings[name]["examples"] = min(wanted, most)
    return settings
