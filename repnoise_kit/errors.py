"""The one kind of error a user can mend."""

import math


class KitError(ValueError):
    """Say in one line what is wrong, with which file, row or argument, and the way out.

    The command line prints it on stderr and exits with code 2; in Python it is a `ValueError`.
    """


def check_numbers(*, above_zero: bool = False, **named: float) -> None:
    """Refuse a hyper-parameter that is negative or not a finite number, by its name."""
    for name, value in named.items():
        if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
            least = "greater than 0" if above_zero else "0 or greater"
            raise KitError(f"{name} must be a finite number {least}, not {value}")
