"""Programs that start in a moment: each is forked from a process that has done their imports, which take
5 to 10 seconds.

Most tests that start `python run.py ...` are about what it does once it runs. After `use()`, whatever starts
such a program through subprocess (a test, or the program itself, which starts its workers) gets a fork: a
child of its own, with the arguments, folder, environment, streams, signals, cores and session that it asked
for. A program whose environment differs in what imports read is started as ever; so a test of the start says
nothing. `pytest --cold` forks none.

python -m tests.forks DESCRIPTOR: the process that has done the imports.
"""

import atexit
import ctypes
import gc
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "run.py"
MODULES = ("tests.ddp_worker", "tests.fsdp_worker", "tests.overlap_worker", "tests.gloo_worker")
MODULES += ("tests.enqueued_worker", "tests.fork_probe", "tests.hashing_worker", "tests.sweep_parent")
MODULES += ("torch.distributed.run", "sage.report", "examples.own_loop")
READ_BY_IMPORTS = ("PYTHON", "LD_", "OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "ATEN_", "NUMBA_")
READ_BY_IMPORTS += ("TRITON_", "CUDA_", "HOME")
"""What the names of environment variables begin with that count only before the imports."""
SET_BY_IMPORTS = ("KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK")  # scikit-learn's
IMPORTS = (SCRIPT.stem, "torch.distributed.run")
IMPORTS += ("torch.utils.tensorboard", "reducers.kernels.cpu", "tests.cases", "tests.test_own_loops")
IMPORTS += ("torch._inductor.config",)  # by torch.use_deterministic_algorithms, which takes 3 s
LOG_LEVEL = "TORCH_CPP_LOG_LEVEL"
"""Read by torch's import too, but torch can be made to read it again."""
SET_CHILD_SUBREAPER = 36  # linux/prctl.h
FIXED_SIGNALS = (signal.SIGKILL, signal.SIGSTOP)
IGNORED_BY_PYTHON = (signal.SIGPIPE, signal.SIGXFSZ)


@dataclass
class Start:
    """A program that is to be started."""

    words: list[str]
    """What follows `python`: a script or -m and a module, and its arguments."""
    unbuffered: bool
    folder: str
    environment: dict[str, str]
    own_session: bool
    cpus: list[int]
    blocked: list[int]
    """Signals that it begins with held back."""
    ignored: list[int]


def parse(args: Sequence[Any], folder: str) -> tuple[list[str], bool] | None:
    """What follows `python [-u]` on a command line, and whether -u is there; None: no program to fork."""
    python, *words = (os.fsdecode(os.fspath(word)) for word in args)
    unbuffered = words[:1] == ["-u"]
    words = words[unbuffered:]
    if python != sys.executable or not words:
        return None
    is_ours = words[1] in MODULES if words[0] == "-m" else Path(folder, words[0]).resolve() == SCRIPT
    return (words, unbuffered) if is_ours else None


def read_by_imports(environment: dict[str, str]) -> dict[str, str]:
    """The variables that count only before the imports."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(READ_BY_IMPORTS) and name not in SET_BY_IMPORTS
    }


# --- the process that starts programs -------------------------------------------------------------


class Forks:
    """Starts programs in the place of subprocess's own function."""

    def __init__(self, environment: dict[str, str], server: socket.socket | None = None) -> None:
        """environment: the one in which the imports were done, or will be. server: the process that has done
        them; None: it is started when it is needed."""
        self._environment, self._server = read_by_imports(environment), server
        self._whole_environment = dict(environment)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self.start_process = subprocess._fork_exec  # type: ignore[attr-defined]
        self._prctl = ctypes.CDLL(None).prctl

    def use(self) -> None:
        subprocess._fork_exec = self.fork_or_start  # type: ignore[attr-defined]

    def end(self) -> None:
        """Start programs as ever; end the process that has imported."""
        subprocess._fork_exec = self.start_process  # type: ignore[attr-defined]
        if self._server is not None:
            self._server.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def fork_or_start(self, *given: Any) -> int:
        """Arguments and result of subprocess._fork_exec."""
        args, _, _, kept, folder, variables = given[:6]
        streams = [given[6], given[9], given[11]]  # the child's ends; -1: as this process's
        own_session = bool(given[15])
        folder = str(Path.cwd()) if folder is None else os.fsdecode(folder)
        environment = dict(os.environ)
        if variables is not None:
            pairs = (os.fsdecode(variable).partition("=") for variable in variables)
            environment = {name: value for name, _, value in pairs}
        parsed = parse(args, folder)
        # kept: one descriptor is subprocess's own.
        if parsed is None or len(kept) > 1 or read_by_imports(environment) != self._environment:
            return int(self.start_process(*given))
        start = Start(
            *parsed,
            folder,
            environment,
            own_session,
            sorted(os.sched_getaffinity(0)),
            [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
            [int(n) for n in signal.valid_signals() if signal.getsignal(n) is signal.SIG_IGN],
        )
        return self._fork(start, [given if given != -1 else own for own, given in enumerate(streams)])

    def _fork(self, start: Start, streams: list[int]) -> int:
        """The program's process id. It becomes this process's child: the server's child that forks it ends,
        and orphans go to the nearest process above that takes them."""
        with self._lock:
            server = self._server = self._server or self._start_server()
            text = json.dumps(asdict(start)).encode()
            self._prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
            try:
                socket.send_fds(server, [len(text).to_bytes(8, "big")], streams)
                server.sendall(text)
                return int.from_bytes(receive(server, 8), "big")
            finally:
                self._prctl(SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def _start_server(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
                cwd=ROOT,
                env=self._whole_environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        return ours


def receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes. Raises EOFError where the other end is closed."""
    found = b""
    while len(found) < count:
        part = connection.recv(count - len(found))
        if not part:
            raise EOFError("the process that forks programs has ended")
        found += part
    return found


def workers_of(launcher: int) -> dict[int, int]:
    """The process ids of a launcher's workers by rank; without those that have ended."""
    listed = subprocess.run(["pgrep", "-P", str(launcher)], capture_output=True)
    found = {rank_of(pid): pid for pid in map(int, listed.stdout.split())}
    return {rank: pid for rank, pid in found.items() if rank is not None}


def rank_of(pid: int) -> int | None:
    """The rank of a worker's process; None: it is no worker, or has ended."""
    with suppress(OSError):
        name = Path(f"/proc/{pid}/comm").read_text()
        if name.startswith("rank "):  # a fork
            return int(name.split()[1])
        if found := re.search(rb"(?:^|\0)RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes()):
            return int(found[1])
    return None


# --- the process that has imported ----------------------------------------------------------------


def serve(connection: socket.socket) -> tuple[Start, list[int]]:
    """Fork the programs that are asked for, until nobody is there to ask. Returns in each program only, with
    what it is and its streams."""
    while True:
        header, streams, _, _ = socket.recv_fds(connection, 8, 3)
        if not header:
            os._exit(0)
        start = Start(**json.loads(receive(connection, int.from_bytes(header, "big"))))
        reading, writing = os.pipe()
        between = os.fork()
        if between == 0:
            program = os.fork()
            if program == 0:
                for descriptor in (reading, writing):
                    os.close(descriptor)
                connection.close()
                return start, streams
            os.write(writing, program.to_bytes(8, "big"))
            os._exit(0)
        for descriptor in (writing, *streams):
            os.close(descriptor)
        pid = os.read(reading, 8)
        os.close(reading)
        os.waitpid(between, 0)
        connection.sendall(pid)


def adopt(start: Start, streams: list[int]) -> None:
    """Make this process what a new one would be."""
    if start.own_session:
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(start.folder)
    os.environ.clear()
    os.environ.update(start.environment)
    os.sched_setaffinity(0, start.cpus)
    set_signals(start.ignored)
    signal.pthread_sigmask(signal.SIG_SETMASK, start.blocked)
    open_streams(start.unbuffered)
    read_log_level_again()
    name_process(f"rank {start.environment['RANK']}" if "RANK" in start.environment else "program")


def set_signals(ignored: Iterable[int]) -> None:
    """As Python has them at its start."""
    for number in set(signal.valid_signals()) - set(FIXED_SIGNALS):
        is_ignored = number in ignored or number in IGNORED_BY_PYTHON
        default = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN if is_ignored else default)


def open_streams(unbuffered: bool) -> None:
    unbuffered |= bool(os.environ.get("PYTHONUNBUFFERED"))
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        before, mode = getattr(sys, name), "wb" if number else "rb"
        stream = TextIOWrapper(
            open(number, mode, 0 if unbuffered and number else -1, closefd=False),  # noqa: SIM115
            before.encoding,
            before.errors,
            line_buffering=not unbuffered and (number == 2 or os.isatty(number)),
            write_through=unbuffered,
        )
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def read_log_level_again() -> None:
    if LOG_LEVEL in os.environ:
        import torch

        library = Path(torch.__file__).parent / "lib" / "libc10.so"
        ctypes.CDLL(str(library))._ZN3c1011initLoggingEv()


def name_process(name: str) -> None:
    Path("/proc/self/comm").write_text(name)


def is_last(start: Start) -> bool:
    """Whether a program is one that starts no others."""
    return "RANK" in start.environment or start.words[1:2] in (["tests.ddp_worker"], ["tests.gloo_worker"])


def wait_to_be_started(connection: socket.socket) -> list[str]:
    """Serve; returns in each program, when it is what it should be, what it is to run. A program that starts
    others asks a server of its own, whose orphans come to it."""
    while True:
        start, streams = serve(connection)
        adopt(start, streams)
        if is_last(start):
            return start.words
        ours, theirs = socket.socketpair()
        if os.fork():
            theirs.close()
            Forks(dict(os.environ), ours).use()
            return start.words
        ours.close()
        connection = theirs
        os.setsid()  # a signal to the program's group is not for this process
        name_process("forks")
        with Path(os.devnull).open("r+b") as nothing:
            for number in range(3):
                os.dup2(nothing.fileno(), number)


def run(words: list[str]) -> None:
    """What `python WORDS` does once it has started."""
    if words[0] == "-m":
        sys.path[0], sys.argv = str(Path.cwd()), words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(words[0]).resolve().parent), words
        runpy.run_path(words[0], run_name="__main__")


def run_and_end(words: list[str]) -> None:
    """Run a program and end its process as Python does, but without freeing the imported modules: that would
    copy their pages, for 0.9 s of processor time. An error and an unusual exit code go Python's own way."""
    code = 0
    try:
        run(words)
    except SystemExit as ended:
        if not isinstance(ended.code, int | None):
            raise
        code = ended.code or 0
    threading._shutdown()  # type: ignore[attr-defined]  # waits for the other threads
    atexit._run_exitfuncs()
    gc.collect()  # what the program has left, if its destructors do something
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError):
        sys.exit(code)
    os._exit(code & 0xFF)


def import_all() -> None:
    """What our programs import, some of it late, but not the programs."""
    for name in IMPORTS:
        import_module(name)
    reducers, tasks = import_module("reducers").REDUCERS, import_module("tasks").TASKS
    for name in reducers:
        reducers[name]
    for name in ("digits", "python_docs", "synthetic_ratings"):
        tasks[name]
    import_module("numba").njit(lambda x: x)(1)  # its first compilation imports, too
    del sys.modules[SCRIPT.stem]


if __name__ == "__main__":
    import_all()
    gc.freeze()  # a collection in a fork would copy every page
    name_process("forks")
    run_and_end(wait_to_be_started(socket.socket(fileno=int(sys.argv[1]))))
