"""How far a worker is, by what it has told."""

import time
from collections.abc import Mapping
from typing import Any


class Progress:
    """How far a worker is with some trials, and how long the rest will take."""

    def __init__(self, count: int) -> None:
        self.count, self.start = count, time.monotonic()
        self.trial: int | None = None
        self.end: str | None = None
        self.done, self.part = 0, 0.0

    def take(self, message: Mapping[str, Any]) -> None:
        """Take in what a worker tells (`trying.Say`)."""
        if "trial" in message:
            self.done += self.trial is not None
            self.trial, self.part = message["trial"], 0.0
        self.part = message.get("share", self.part)
        self.end = message.get("end", self.end)

    def share(self) -> float:
        """Return the share that is done, from 0 to 1."""
        return min(1.0, (self.done + self.part) / self.count)

    def left(self) -> str:
        """Say how long the rest will take."""
        share = self.share()
        if share < 0.02:
            return "begun"
        rest = (time.monotonic() - self.start) * (1 - share) / share
        return f"about {rest / 60:.0f} min left" if rest > 90 else f"about {rest:.0f} s left"
