"""What is printed cannot steer a terminal, and a stream that takes no more is one line."""

import subprocess
import sys
from pathlib import Path

import pytest

from sage.console import printable

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ± text\n\tand lines", "plain ± text\n\tand lines"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb", r"a\rb"),
        ("\x9b31m", r"\x9b31m"),
        ("abc\u202egnp.exe", r"abc\u202egnp.exe"),
        ("half \ud800", r"half \ud800"),
    ],
)
def test_what_steers_a_terminal_is_made_visible(text: str, shown: str) -> None:
    assert printable(text) == shown


def run_with(encoding: str, call: str) -> subprocess.CompletedProcess[bytes]:
    code = f"from sage.console import complain, say, show\n{call}"
    environment = {"PYTHONIOENCODING": encoding, "PATH": "/usr/bin:/bin"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, env=environment)


@pytest.mark.parametrize("call", ["show('0.97 ±0.01')", "say('0.97 ±0.01')", "complain('0.97 ±0.01')"])
@pytest.mark.parametrize(
    ("encoding", "shown"), [("ascii", rb"\xb1"), ("latin-1", b"\xb1"), ("utf-8", "±".encode())]
)
def test_a_stream_of_another_encoding_gets_what_it_can_hold(encoding: str, shown: bytes, call: str) -> None:
    done = run_with(encoding, call)
    assert done.returncode == 0, done.stderr
    assert b"0.97 " + shown + b"0.01" in done.stdout + done.stderr
    assert b"Traceback" not in done.stderr


def test_an_answer_that_cannot_be_written_is_one_line_and_exit_code_1() -> None:
    code = "import sys\nfrom sage.console import show\nsys.exit(show('text'))"
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr == b"run.py: the answer cannot be written: No space left on device\n"
