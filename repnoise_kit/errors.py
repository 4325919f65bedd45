"""The one kind of error a user can mend."""

import math
from numbers import Integral, Real


class KitError(ValueError):
    """Say in one line what is wrong, with which file, row or argument, and the way out.

    The command line prints it on stderr and exits with code 2; in Python it is a `ValueError`.
    """


def check_numbers(*, above_zero: bool = False, **named: float) -> None:
    """Refuse a hyper-parameter that is negative or not a finite number, by its name."""
    for name, value in named.items():
        good = isinstance(value, Real) and math.isfinite(value) and value >= 0
        if not good or (above_zero and value == 0):
            least = "greater than 0" if above_zero else "0 or greater"
            raise KitError(f"{name} must be a finite number {least}, not {value!r}")


def check_whole(**named: int) -> None:
    """Refuse a count or seed that is not a whole number from 0 to 2³² - 1, by its name."""
    for name, value in named.items():
        if not isinstance(value, Integral) or not 0 <= value < 2**32:
            raise KitError(f"{name} must be a whole number from 0 to {2**32 - 1}, not {value!r}")
