"""What a process does with the signals that end a run; each test starts a process of its own."""

import signal
import subprocess
import sys
import time
from pathlib import Path
from signal import Signals

import pytest

ROOT = Path(__file__).parent.parent
DEFAULT = """
import signal
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
    signal.signal(number, signal.SIG_DFL)
"""
"""Whatever the tests were started to ignore (nohup)."""
WAIT = """
import sys, time
from sage.workers.signals import WATCH
WATCH.listen()
def wait(seconds=60):
    for _ in range(10 * seconds):
        print(WATCH.received.name if WATCH.received else "none", flush=True)
        time.sleep(0.1)
"""
BEFORE = WAIT + "wait()"
TRAINING = WAIT + "with WATCH.deferred(): wait()"


def start(code: str) -> subprocess.Popen:
    words = [sys.executable, "-c", DEFAULT + code]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "none\n"  # it is listening
    return process


def wait_until_it_prints(process: subprocess.Popen, word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == word:
            return
    raise AssertionError(f"it ended with {process.wait()} and did not print {word}")


def exit_code(process: subprocess.Popen) -> int:
    process.communicate(timeout=30)
    return process.returncode


@pytest.mark.parametrize("number", [Signals.SIGTERM, Signals.SIGINT, Signals.SIGHUP, Signals.SIGQUIT])
def test_before_the_workers_have_met_a_signal_ends_the_process(number: Signals) -> None:
    process = start(BEFORE)
    process.send_signal(number)
    assert exit_code(process) == 128 + number


def test_slurms_warning_is_noted_before_the_workers_have_met() -> None:
    process = start(BEFORE)
    process.send_signal(Signals.SIGUSR1)
    wait_until_it_prints(process, "SIGUSR1")
    process.kill()
    exit_code(process)


@pytest.mark.parametrize("number", [Signals.SIGTERM, Signals.SIGINT, Signals.SIGHUP, Signals.SIGUSR1])
def test_while_it_trains_a_signal_is_noted_and_a_second_interrupt_ends_it_at_once(number: Signals) -> None:
    process = start(TRAINING)
    process.send_signal(number)
    wait_until_it_prints(process, number.name)
    process.send_signal(Signals.SIGINT)
    if number != Signals.SIGINT:  # the first one
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(Signals.SIGINT)
    assert exit_code(process) == 128 + Signals.SIGINT


def test_a_second_interrupt_ends_the_process_even_while_python_waits_in_c() -> None:
    """As in a collective: Python runs no handler while the main thread is in C."""
    twice = "lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(64)"
    code = (
        f"import ctypes\n{twice}\nprint('none', flush=True)\nwith WATCH.deferred(): lock(mutex), lock(mutex)"
    )
    process = start(WAIT + code)
    time.sleep(0.5)
    process.send_signal(Signals.SIGINT)
    time.sleep(0.5)
    process.send_signal(Signals.SIGINT)
    assert exit_code(process) == 128 + Signals.SIGINT


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored() -> None:
    """nohup python run.py ... &"""
    process = start("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + BEFORE)
    process.send_signal(Signals.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(Signals.SIGTERM)
    assert exit_code(process) == 128 + Signals.SIGTERM


def test_a_signal_during_the_start_of_a_child_reaches_it_once_it_listens() -> None:
    child = WAIT + "with WATCH.deferred(): wait()"
    parent = (
        WAIT
        + f"""
import os, signal, subprocess
children = []
with WATCH.handed_on(lambda number: [child.send_signal(number) for child in children]):
    with WATCH.held():
        children.append(subprocess.Popen([sys.executable, "-c", {child!r}]))
    print("none", flush=True)
    os.kill(os.getpid(), signal.SIGUSR1)  # long before the child listens
    children[0].wait()
"""
    )
    process = start(parent)
    wait_until_it_prints(process, "SIGUSR1")  # the child prints it; the parent prints nothing more
    process.send_signal(signal.SIGQUIT)
    assert exit_code(process) == 0
