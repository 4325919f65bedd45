"""Long work ends between two steps, and tells how far it has come."""

import signal
import subprocess
import sys
import threading

import pytest
import torch

from repnoise_kit import steps
from repnoise_kit.training import train_


def train(count=6, **more):
    model = torch.nn.Linear(2, 1)
    examples = [torch.ones(2) for _ in range(count)]
    return model, lambda: train_(
        model,
        lambda inner, batch: {"total": inner(batch["x"]).square().mean()},
        examples,
        lambda rows: {"x": torch.stack(rows)},
        lr=0.01,
        batch_size=1,
        **more,
    )


def test_who_listens_hears_each_step_with_the_terms_that_are_logged():
    heard = []
    _, go = train()
    with steps.hearing(heard.append):
        curves = go().frame
    go()
    assert [(step.number, step.of) for step in heard] == [(n, 6) for n in range(1, 7)]
    logged = curves[curves["metric"] == "total"]["value"].tolist()
    assert [step.terms["total"] for step in heard] == logged


def test_asked_to_stop_it_takes_no_further_step_and_forgets_that_it_was_asked():
    taken = []

    def stop_at_two(step):
        taken.append(step.number)
        if step.number == 2:
            steps.ask_to_stop()

    model, go = train()
    with steps.hearing(stop_at_two), pytest.raises(KeyboardInterrupt):
        go()
    assert taken == [1, 2]
    assert not steps.stop_asked()
    before = model.weight.detach().clone()
    go()
    assert not torch.equal(before, model.weight)


def test_a_listener_that_left_hears_nothing_even_after_an_error():
    heard = []
    with pytest.raises(RuntimeError), steps.hearing(heard.append):
        raise RuntimeError
    train()[1]()
    assert heard == []


LOST = """
import signal, time
from repnoise_kit import steps

class Deaf:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)  # what is raised in here, Python prints and forgets

with steps.interruptible():
    deaf = Deaf()
    del deaf
    print("went on", flush=True)
    steps.check()
    print("not reached")
"""


def test_an_interrupt_that_python_loses_is_heard_at_the_next_check():
    done = subprocess.run([sys.executable, "-c", LOST], capture_output=True, text=True)
    assert done.stdout == "went on\n"
    assert done.returncode != 0
    assert "ignored" in done.stderr


def test_one_that_is_lost_in_the_last_of_the_work_is_heard_at_its_end():
    code = LOST.replace('    steps.check()\n    print("not reached")\n', "")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "went on\n"
    assert done.returncode == -signal.SIGINT or done.returncode == 130


def test_ctrl_c_is_as_it_was_afterwards():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), steps.interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    assert not steps.stop_asked()


def test_in_a_thread_which_may_not_say_what_a_signal_does_it_does_nothing():
    found = []

    def work():
        with steps.interruptible():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    before = signal.getsignal(signal.SIGINT)
    thread.start()
    thread.join()
    assert found == [before]


UNHEARD = """
import os, signal, subprocess, sys
from contextlib import nullcontext
from repnoise_kit.steps import unheard

# Where this test is run in the background, Ctrl-C is ignored from the start.
signal.signal(signal.SIGINT, signal.default_int_handler)

def lives(around):
    with around:
        child = subprocess.Popen(
            [sys.executable, "-c", "import time; print(1, flush=True); time.sleep(60)"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )
    child.stdout.readline()
    child.send_signal(signal.SIGINT)
    try:
        return child.wait(1) is None
    except subprocess.TimeoutExpired:
        child.kill()
        return True

print(lives(nullcontext()), lives(unheard()))
try:
    with unheard():
        os.kill(os.getpid(), signal.SIGINT)
        print("not yet")
except KeyboardInterrupt:
    print("heard afterwards")
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="signals cannot be held back")
def test_ctrl_c_does_not_reach_a_process_that_is_started_unheard_and_is_heard_by_its_starter():
    said = subprocess.run([sys.executable, "-c", UNHEARD], capture_output=True, text=True).stdout
    assert said.splitlines() == ["False True", "not yet", "heard afterwards"]
