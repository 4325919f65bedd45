"""Harmless tasks that a defended model should still learn: what trainability is measured on."""

from dataclasses import dataclass

import pandas as pd

from repnoise_kit.errors import KitError
from repnoise_kit.pairs import check_texts


@dataclass(frozen=True)
class Task:
    """Inputs and outputs to fine-tune on, and others to be asked."""

    name: str
    train: pd.DataFrame
    """Columns `prompt`, `answer`."""
    test: pd.DataFrame
    """The same columns; no prompt is in both."""

    def __post_init__(self) -> None:
        """Refuse missing texts and shared prompts."""
        for part, table in (("train", self.train), ("test", self.test)):
            check_texts(table, ("prompt", "answer"), f"task {self.name}, {part}")
        shared = self.test["prompt"].isin(self.train["prompt"])
        if shared.any():
            raise KitError(
                f"task {self.name}: {shared.sum()} prompts of the test are trained on (first: "
                f"{self.test.loc[shared, 'prompt'].iloc[0]!r}); keep each in one of the two"
            )
