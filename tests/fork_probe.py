"""A program that tells what it was started with, and starts one like it.

python -m tests.fork_probe EXIT_CODE [children]
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """What is the same however the program is started."""
    return {
        "arguments": sys.argv[1:],
        "main": __name__,
        "path": sys.path,
        "folder": str(Path.cwd()),
        "environment": dict(os.environ),
        "leads its session": os.getsid(0) == os.getpid(),
        "cpus": sorted(os.sched_getaffinity(0)),
        "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "signals": {n: str(signal.getsignal(n)).split(" at ")[0] for n in sorted(signal.valid_signals())},
        "streams": [
            (stream.encoding, stream.errors, stream.line_buffering, stream.write_through, stream.fileno())
            for stream in (sys.stdin, sys.stdout, sys.stderr)
        ],
    }


def end_late() -> None:
    """What a thread does that the end of the program waits for."""
    time.sleep(0.05)
    print("of a thread", file=sys.stderr)


if __name__ == "__main__":
    atexit.register(print, "at the end", file=sys.stderr)
    told = [facts()]
    if sys.argv[2:]:
        command = [sys.executable, "-u", "-m", "tests.fork_probe", "0"]
        done = subprocess.run(command, capture_output=True, text=True, start_new_session=True, check=True)
        told += json.loads(done.stdout)
    print(json.dumps(told))
    print("to the other stream", file=sys.stderr)
    threading.Thread(target=end_late).start()
    sys.exit(int(sys.argv[1]))
