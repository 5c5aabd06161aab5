"""The kinds of fault: how each is caused, and what a run promises to do then."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from signal import SIGKILL, SIGSTOP, Signals

from tests.victim import FULL, TooLateError, Victim, count_steps, has_incomplete_checkpoint, saved_steps

VARIANTS = {
    "kill": ("one worker", "the launcher", "all"),
    "hang": ("one worker",),
    "signal": (
        *(f"{name} to {whom}" for name in ("SIGUSR1", "SIGTERM") for whom in ("the launcher", "one")),
        *("SIGINT to the launcher", "SIGINT twice to the launcher"),
    ),
    "cut write": (
        "at a temporary file",
        "before the manifest",
        "manifest gone",
        "rank file cut",
        "line torn",
    ),
    "full disk": ("required", "room again", "full to the end"),
}


@dataclass(frozen=True)
class Fault:
    """Something that happens to a run."""

    kind: str
    variant: str
    after: int
    """How many steps the processes do before it happens."""
    rank: int = 0
    share: float = 0.5
    """In [0, 1): how much is left of a file that is cut; or how much of 0.1 s passes between two signals."""

    @property
    def overrides(self) -> list[str]:
        """Overrides of the configuration for the launch in which it happens: a short timeout where workers
        must time out; whether a checkpoint that cannot be written ends the run."""
        if self.kind == "hang":
            return ["timeout_seconds=10"]
        required = self.kind != "full disk" or self.variant == "required"
        return [f"checkpoint.required={str(required).lower()}"]

    def __str__(self) -> str:
        return f"{self.kind} ({self.variant}, rank {self.rank}) after {self.after} steps"


@dataclass
class Trial:
    """The result of a run with faults; lost and since have a number for each fault."""

    faults: Sequence[Fault]
    failures: list[str] = field(default_factory=list)
    """Promises that the run broke; empty: it survived."""
    lost: list[int] = field(default_factory=list)
    """Steps done when the fault happened, less those of the checkpoint that the run was resumed from."""
    since: list[int] = field(default_factory=list)
    """Steps done when the fault happened, less those of the last whole checkpoint."""
    restarts: int = 0
    """How often the run started again, since there was no checkpoint yet."""
    incomplete: int = 0
    """How often the processes died while a checkpoint was incomplete."""
    bits: int = 0
    """How many bits of the final weights differ from the undisturbed run's."""
    seconds: float = 0.0

    def expect(self, holds: bool, message: str) -> None:
        """Add the message to the failures, unless the promise holds."""
        if not holds:
            self.failures.append(message)


def kill(victim: Victim, fault: Fault, trial: Trial) -> None:
    workers = victim.workers()
    chosen = {"one worker": [workers[fault.rank]], "the launcher": [], "all": [*workers.values()]}
    launcher = [victim.pid] if fault.variant != "one worker" else []
    victim.send(SIGKILL, *chosen[fault.variant], *launcher)
    code = victim.end()
    trial.expect(code == (-SIGKILL if launcher else 1), f"exit code {code} after a kill")
    named = f"worker {fault.rank} was the first to fail (signal 9)"
    trial.expect(bool(launcher) or named in victim.said(), f"the killed worker is not named: {victim.said()}")


def hang(victim: Victim, fault: Fault, trial: Trial) -> None:
    """Stop a worker until the others have given up, then kill it; else the launcher would, 30 s later."""
    stopped = victim.workers()[fault.rank]
    victim.send(SIGSTOP, stopped)
    named = f"rank {fault.rank} fell behind: it no longer answers"
    was_said = victim.wait_for(lambda: named in victim.said(), named)
    trial.expect(was_said, f"{named}: not said: {victim.said()}")
    victim.send(SIGKILL, stopped)
    code = victim.end()
    trial.expect(code == 1, f"exit code {code} after a hang")


def send_signal(victim: Victim, fault: Fault, trial: Trial) -> None:
    """Send a signal, which ends the run gracefully, or a second Ctrl-C, which does not."""
    name, *words = fault.variant.split()
    whom = victim.workers()[fault.rank] if words[-1] == "one" else victim.pid
    victim.send(Signals[name], whom)
    if "twice" in words:
        time.sleep(0.1 * fault.share)
        victim.send(Signals[name], whom)
    code, by_hand, run = victim.end(), name == "SIGINT", victim.folder
    trial.expect(code == (130 if by_hand else 0), f"exit code {code} after {fault.variant}: {victim.said()}")
    marked = (run / "requeue").exists()
    found = "there" if marked else "missing"
    trial.expect(marked is not by_hand, f"after {fault.variant} the file requeue is {found}")
    if "twice" not in words:
        saved, reached = saved_steps(run), count_steps(run)
        trial.expect(saved == reached, f"stopped after step {reached}, with a checkpoint after step {saved}")


def cut_write(victim: Victim, fault: Fault, trial: Trial) -> None:
    """Kill all processes while they write a checkpoint, and leave its files as that could have left them."""

    def writes() -> bool:
        if fault.variant == "at a temporary file":
            return any(victim.folder.glob("checkpoints/step-*/.*.tmp"))
        return fault.variant != "before the manifest" or has_incomplete_checkpoint(victim.folder)

    if not victim.wait_for(writes, "an incomplete checkpoint", pause_seconds=0.0005):
        raise TooLateError("an incomplete checkpoint")
    victim.kill_all()
    code = victim.end()
    trial.expect(code == -SIGKILL, f"exit code {code} after a kill")
    if has_incomplete_checkpoint(victim.folder):
        trial.incomplete += 1
    _damage(victim, fault)


def _damage(victim: Victim, fault: Fault) -> None:
    """Do to the files what the death could have done to them a moment earlier or later."""
    newest = victim.folder / "checkpoints" / f"step-{saved_steps(victim.folder):08d}"
    if fault.variant == "manifest gone":
        (newest / "manifest.json").unlink(missing_ok=True)
    elif fault.variant == "rank file cut" and newest.exists():
        path = newest / f"rank{fault.rank}.pt"
        os.truncate(path, int(fault.share * path.stat().st_size))
    elif fault.variant == "line torn":
        metrics = victim.folder / "metrics.jsonl"
        last = metrics.read_bytes().splitlines()[-1]
        with metrics.open("ab") as file:  # the beginning of the line of a step that is in no checkpoint
            file.write(last[: 1 + int(fault.share * (len(last) - 1))])


def fill_disk(victim: Victim, fault: Fault, trial: Trial) -> None:
    """Fill the disk until the run ends or, for "room again", until it has said that it waits."""
    filler = victim.runs / "filler"

    def complained() -> bool:
        with suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(65536)):  # also what has become free since
                pass
        said = victim.said()
        waits = "new lines wait until there is room" in said and "no checkpoint after step" in said
        return waits and fault.variant == "room again"

    if not victim.wait_for(complained, FULL):
        code = victim.end()
        trial.expect(code == 1, f"exit code {code} on a full disk: {victim.said()}")
    lines = [line for line in victim.said().splitlines() if FULL in line]
    alone = len(lines) == 1 or fault.variant != "required"
    trial.expect(bool(lines) and alone, f"expected a line about a full disk, got {lines}")
    filler.unlink()


DISTURB = {
    "kill": kill,
    "hang": hang,
    "signal": send_signal,
    "cut write": cut_write,
    "full disk": fill_disk,
}
"""kind -> the function that causes the fault and checks what is promised. The processes have ended when it
returns, unless there is room on the disk again."""
