"""The kinds of fault: how each is made to come to a run, and what the run promises then."""

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from signal import SIGKILL, SIGSTOP, Signals

from tests.victim import FULL, TooLateError, Victim, count_steps, is_torn, whole

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
    kind: str
    variant: str
    after: int
    """Steps that the run does before, since its process began."""
    rank: int = 0
    share: float = 0.5
    """In [0, 1): how much is left of a file that is cut; what part of 0.1 s is between two signals."""

    @property
    def overrides(self) -> list[str]:
        """Of the launch that it comes to: a short timeout where one is to pass; whether a checkpoint that
        cannot be written ends the run."""
        if self.kind == "hang":
            return ["timeout_seconds=10"]
        required = self.kind != "full disk" or self.variant == "required"
        return [f"checkpoint.required={str(required).lower()}"]

    def __str__(self) -> str:
        return f"{self.kind} ({self.variant}, rank {self.rank}) after {self.after} steps"


@dataclass
class Trial:
    """What became of a run that suffered faults; lost and since have a number for each."""

    faults: Sequence[Fault]
    troubles: list[str] = field(default_factory=list)
    """What broke the law; empty: the run survived."""
    lost: list[int] = field(default_factory=list)
    """Steps done at the fault less those of the checkpoint that the run went on from."""
    since: list[int] = field(default_factory=list)
    """Steps done at the fault less those of the last whole checkpoint."""
    begun_again: int = 0
    """How often there was no checkpoint yet to go on from."""
    torn: int = 0
    """How many deaths left a checkpoint half written."""
    bits: int = 0
    """Of the final weights that differ from the undisturbed run's."""
    seconds: float = 0.0

    def expect(self, holds: bool, told: str) -> None:
        if not holds:
            self.troubles.append(told)


def kill(victim: Victim, fault: Fault, trial: Trial) -> None:
    workers = victim.workers()
    chosen = {"one worker": [workers[fault.rank]], "the launcher": [], "all": [*workers.values()]}
    launcher = [victim.pid] if fault.variant != "one worker" else []
    victim.send(SIGKILL, *chosen[fault.variant], *launcher)
    code = victim.end()
    trial.expect(code == (-SIGKILL if launcher else 1), f"exit code {code} after a kill")
    told = f"worker {fault.rank} was the first to fail (signal 9)"
    trial.expect(bool(launcher) or told in victim.said(), f"the killed worker is not named: {victim.said()}")


def hang(victim: Victim, fault: Fault, trial: Trial) -> None:
    """The launcher would kill the stopped worker 30 s after the others gave up."""
    stopped = victim.workers()[fault.rank]
    victim.send(SIGSTOP, stopped)
    told = f"rank {fault.rank} fell behind: it no longer answers"
    trial.expect(victim.wait_for(lambda: told in victim.said(), told), f"{told}: not said: {victim.said()}")
    victim.send(SIGKILL, stopped)
    code = victim.end()
    trial.expect(code == 1, f"exit code {code} after a hang")


def tell(victim: Victim, fault: Fault, trial: Trial) -> None:
    """A signal is a graceful end; a second Ctrl-C is not."""
    name, *words = fault.variant.split()
    whom = victim.workers()[fault.rank] if words[-1] == "one" else victim.pid
    victim.send(Signals[name], whom)
    if "twice" in words:
        time.sleep(0.1 * fault.share)
        victim.send(Signals[name], whom)
    code, by_hand, run = victim.end(), name == "SIGINT", victim.folder
    trial.expect(code == (130 if by_hand else 0), f"exit code {code} after {fault.variant}: {victim.said()}")
    marked = (run / "requeue").exists()
    trial.expect(marked is not by_hand, f"after {fault.variant} requeue is {'' if marked else 'not '}there")
    if "twice" not in words:
        saved, reached = whole(run), count_steps(run)
        trial.expect(saved == reached, f"stopped after step {reached}, with a checkpoint after step {saved}")


def cut(victim: Victim, fault: Fault, trial: Trial) -> None:
    """All die while they write a checkpoint, or leave what they could have left then."""

    def writes() -> bool:
        if fault.variant == "at a temporary file":
            return any(victim.folder.glob("checkpoints/step-*/.*.tmp"))
        return fault.variant != "before the manifest" or is_torn(victim.folder)

    if not victim.wait_for(writes, "a checkpoint half written", pause_seconds=0.0005):
        raise TooLateError("a checkpoint half written")
    victim.kill_all()
    code = victim.end()
    trial.expect(code == -SIGKILL, f"exit code {code} after a kill")
    trial.torn += is_torn(victim.folder)
    newest = victim.folder / "checkpoints" / f"step-{whole(victim.folder):08d}"
    if fault.variant == "manifest gone":
        (newest / "manifest.json").unlink(missing_ok=True)
    elif fault.variant == "rank file cut" and newest.exists():
        path = newest / f"rank{fault.rank}.pt"
        os.truncate(path, int(fault.share * path.stat().st_size))
    elif fault.variant == "line torn":
        metrics = victim.folder / "metrics.jsonl"
        last = metrics.read_bytes().splitlines()[-1]
        with metrics.open("ab") as file:  # the beginning of the next step's, which no checkpoint has
            file.write(last[: 1 + int(fault.share * (len(last) - 1))])


def starve(victim: Victim, fault: Fault, trial: Trial) -> None:
    """The disk is full until the run ends or, where there is to be room again, has said that it waits."""
    filler = victim.runs / "filler"

    def complained() -> bool:
        with suppress(OSError), filler.open("ab", buffering=0) as file:
            while file.write(bytes(65536)):  # what became free since too
                pass
        said = victim.said()
        waits = "what comes waits for room" in said and "no checkpoint after step" in said
        return waits and fault.variant == "room again"

    if not victim.wait_for(complained, FULL):
        code = victim.end()
        trial.expect(code == 1, f"exit code {code} on a full disk: {victim.said()}")
    told = [line for line in victim.said().splitlines() if FULL in line]
    alone = len(told) == 1 or fault.variant != "required"
    trial.expect(bool(told) and alone, f"expected a line about a full disk, got {told}")
    filler.unlink()


DISTURB = {"kill": kill, "hang": hang, "signal": tell, "cut write": cut, "full disk": starve}
"""Each lets a fault come and checks what is promised; the processes have ended then, but with room again."""
