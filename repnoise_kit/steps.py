"""Between two steps of long work: stop it there, and hear how far it has come."""

import signal
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple


class Step(NamedTuple):
    """One step of a training, as it was taken."""

    number: int
    of: int
    terms: Mapping[str, float]
    """The scalars of the loss at this step, by name."""


_asked = threading.Event()
_listeners: list[Callable[[Step], None]] = []


def ask_to_stop() -> None:
    """Let long work of this process end with `KeyboardInterrupt` at its next `check`."""
    _asked.set()


def stop_asked() -> bool:
    """Whether somebody asked this process to stop."""
    return _asked.is_set()


def check() -> None:
    """End here, between two steps, if somebody asked for it."""
    if _asked.is_set():
        _asked.clear()
        raise KeyboardInterrupt


@contextmanager
def interruptible() -> Generator[None]:
    """Let Ctrl-C be heard even where Python loses it.

    Python raises `KeyboardInterrupt` wherever it happens to be; inside a destructor or a callback
    from C it is printed and forgotten. Here it is noted too, so that the next `check` raises it.
    """

    def heard(*signal_and_frame: Any) -> None:
        _asked.set()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread may say what a signal does.
        return
    before = signal.signal(signal.SIGINT, heard)
    try:
        yield
        check()
    finally:
        signal.signal(signal.SIGINT, before)
        _asked.clear()


@contextmanager
def unheard() -> Generator[None]:
    """Start processes here that no Ctrl-C reaches, not even while they import.

    They inherit that it is held back; this process hears of it when the context ends.
    """
    if not hasattr(signal, "pthread_sigmask"):  # On Windows.
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def hearing(listener: Callable[[Step], None]) -> Generator[None]:
    """Call `listener` after each step of each training of this process, until the context ends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def taken(number: int, of: int, terms: Mapping[str, Any]) -> None:
    """Tell whoever listens of a step; numbers are taken off the device only for a listener."""
    if _listeners:
        step = Step(number, of, {name: float(value) for name, value in terms.items()})
        for listener in list(_listeners):
            listener(step)
