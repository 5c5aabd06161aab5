"""A fault campaign: runs that are killed, frozen, signalled, cut off while they write or out of disk, and
then resumed, end like one that was left alone, bit for bit.

    .venv/bin/python tests/faults.py --trials 50 [--seed 1] [--jobs 1] [--json FILE]
"""

import argparse
import json
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from signal import SIGTERM, signal
from subprocess import SubprocessError

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.disturb import DISTURB, VARIANTS, Fault, Trial
from tests.victim import (
    FINAL,
    RESUMED,
    STEPS,
    TooLateError,
    Victim,
    count_steps,
    difference,
    differing_bits,
    saved_steps,
    small_disk,
    steps_of,
    why_no_disk,
)


def draw(seed: int, number: int, kinds: Sequence[str], most: int) -> Fault:
    """The fault with a number: kinds and variants in turn; rank, share and steps (at most most) at random."""
    rng, kind = random.Random(f"{seed}/{number}"), kinds[number % len(kinds)]
    variant = VARIANTS[kind][number // len(kinds) % len(VARIANTS[kind])]
    return Fault(kind, variant, rng.randint(1, most), rng.randrange(2), rng.random())


def table(trials: Sequence[Trial]) -> str:
    """The results in a table, with a row for each kind of fault."""
    names = ("kind", "trials", "survived", "restarted", "incomplete", "lost steps mean", "max")
    rows = [[*names, "steps since checkpoint max", "differing bits", "seconds mean"]]
    for kind in VARIANTS:
        mine = [trial for trial in trials if trial.faults[0].kind == kind]
        if not mine:
            continue
        lost, since = [n for t in mine for n in t.lost], [n for t in mine for n in t.since]
        counts = [len(mine), sum(not t.failures for t in mine), sum(t.restarts for t in mine)]
        counts.append(sum(t.incomplete for t in mine))
        steps = [
            f"{sum(lost) / max(1, len(lost)):.1f}",
            f"{max(lost, default=0)}",
            f"{max(since, default=0)}",
        ]
        seconds = f"{sum(t.seconds for t in mine) / len(mine):.0f}"
        rows.append([kind, *map(str, counts), *steps, f"{sum(t.bits for t in mine)}", seconds])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in rows)


# --- trials ---------------------------------------------------------------------------------------


def endure(victim: Victim, trial: Trial) -> None:
    """Start a run, cause its faults one after the other, and resume it after each, until it ends."""
    victim.start(*trial.faults[0].overrides)
    for fault, following in zip(trial.faults, [*trial.faults[1:], None], strict=True):
        victim.wait_for_steps(count_steps(victim.folder) + fault.after)
        run, before = victim.folder, saved_steps(victim.folder)
        victim.workers()
        DISTURB[fault.kind](victim, fault, trial)
        damaged = fault.variant in ("manifest gone", "rank file cut")
        reached, newest = count_steps(run), saved_steps(run)
        trial.expect(damaged or newest >= before, f"the checkpoint after step {before} is gone")
        trial.expect("Traceback" not in victim.said(), victim.said())
        steps = steps_of(run)
        trial.expect(steps == list(range(len(steps))), "metrics.jsonl has not each step once")
        trial.since.append(reached - newest)
        trial.lost.append(reached - resume(victim, newest, following, trial) if victim.has_ended() else 0)
        trial.expect(trial.lost[-1] <= trial.since[-1], f"lost {trial.lost[-1]} of {trial.since[-1]} steps")
    code = victim.end()
    trial.expect(code == 0, f"exit code {code} in the end: {victim.said()}")
    trial.expect("Traceback" not in victim.said(), victim.said())


OLDER = re.compile(r"an older one is whole: --resume (\S+)")
CANNOT_RESUME = ("run.py: --resume: expected a run", "there is no older one that is whole")


def resume(victim: Victim, newest: int, following: Fault | None, trial: Trial) -> int:
    """Resume the run, from the older checkpoint that a message names where the newest is damaged, or start it
    again where it has none; returns the steps it is resumed from."""
    overrides, run = following.overrides if following else [], victim.folder
    resumed = start_resumed(victim, overrides)
    if resumed is None and (named := OLDER.search(victim.said())):
        victim.end()
        resumed = start_resumed(victim, overrides, named[1])
    if resumed is not None:
        return resumed
    code, said = victim.end(), victim.said()
    if newest or code != 2 or not any(line in said for line in CANNOT_RESUME) or "Traceback" in said:
        raise RuntimeError(f"--resume with a checkpoint after step {newest} ended with {code}: {said}")
    trial.restarts += 1
    victim.start(*overrides)
    victim.wait_for(lambda: victim.folder != run, "to start again")
    return 0


def start_resumed(victim: Victim, overrides: Sequence[str], *path: str) -> int | None:
    """Start the run with --resume; returns the steps it is resumed from, or None where it ends instead."""
    victim.start(*overrides, "--resume", *path)
    if not victim.wait_for(lambda: RESUMED.search(victim.said()) is not None, "to resume"):
        return None
    found = RESUMED.search(victim.said())
    assert found is not None
    return int(found[1])


def carry_out(faults: Sequence[Fault], place: Path, reference: "Future[Path]") -> Trial:
    """Carry out a trial in a folder of its own; with earlier faults where the run ends before one happens."""
    trial, began = Trial(faults), time.monotonic()
    place.mkdir(parents=True)
    on_disk = any(fault.kind == "full disk" for fault in faults)
    try:
        with small_disk(place / "disk") if on_disk else nullcontext(place / "runs") as runs:
            victim = Victim(runs, place)
            try:
                endure(victim, trial)
            finally:
                victim.close()
            done = [path.parent for path in runs.glob("digits/*/summary.json")]
            trial.expect(len(done) == 1, f"expected one run that is done, found {done}")
            for run in done:
                trial.bits += differing_bits(run / FINAL, reference.result() / FINAL)
                found = difference(run, reference.result())
                trial.expect(not found, found)
    except TooLateError:
        sooner = [replace(fault, after=fault.after // 2) for fault in faults]
        if any(fault.after for fault in faults):
            return carry_out(sooner, place / "sooner", reference)
        trial.failures.append("the run ended before its fault could happen")
    except (RuntimeError, AssertionError, LookupError, OSError, SubprocessError) as error:
        trial.failures.append(f"{type(error).__name__}: {error}")
    trial.seconds = time.monotonic() - began
    return trial


def undisturbed(place: Path) -> Path:
    """Train without faults; returns the folder of the run that the others are compared with."""
    place.mkdir(parents=True)
    victim = Victim(place, place)
    victim.start()
    try:
        code = victim.end()
        assert code == 0, victim.said()
        assert steps_of(victim.folder) == list(range(STEPS)), "the undisturbed run has not each step once"
        return victim.folder
    finally:
        victim.close()


def campaign(
    trials: Sequence[Sequence[Fault]],
    place: Path,
    jobs: int,
    take: Callable[[int, Trial], object] = lambda *_: None,
) -> list[Trial]:
    """Carry out the trials, jobs at once, and beside them the undisturbed run.

    take: is called with each trial's number and the trial when it is done.
    """

    def one(number: int, faults: Sequence[Fault]) -> Trial:
        trial = carry_out(faults, place / str(number), reference)
        take(number, trial)
        return trial

    with ThreadPoolExecutor(jobs) as pool:
        reference = pool.submit(undisturbed, place / "undisturbed")
        running = [pool.submit(one, number, faults) for number, faults in enumerate(trials)]
        try:
            return [future.result() for future in running]
        finally:
            pool.shutdown(cancel_futures=True)  # where this program ends early, no further trial starts


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description="Runs that are disturbed end like one that was not.")
    parser.add_argument("--trials", type=int, default=50, help="runs to disturb")
    parser.add_argument("--seed", type=int, default=1, help="of the choice of faults")
    parser.add_argument("--jobs", type=int, default=1, help="trials at once")
    parser.add_argument("--json", type=Path, help="where to write all trials")
    options, kinds = parser.parse_args(), list(VARIANTS)
    signal(SIGTERM, interrupt)
    trials: list[Trial] = []

    def take(number: int, trial: Trial) -> None:
        trials.append(trial)
        what = f"FAILED: {'; '.join(trial.failures)}" if trial.failures else "survived"
        print(f"{number}: {', '.join(map(str, trial.faults))}: lost {trial.lost} steps, {what}", flush=True)

    with tempfile.TemporaryDirectory(prefix="faults-") as name:
        if reason := why_no_disk(Path(name) / "disk"):
            kinds.remove("full disk")
            print(f"full disk: skipped: {reason}")
        faults = [[draw(options.seed, n, kinds, int(0.7 * STEPS))] for n in range(options.trials)]
        try:
            campaign(faults, Path(name), options.jobs, take)
        except KeyboardInterrupt:
            print(f"interrupted after {len(trials)} of {options.trials} trials")
    print(table(trials))
    if options.json:
        options.json.write_text(json.dumps([asdict(trial) for trial in trials], indent=2) + "\n")
    return 1 if len(trials) < options.trials or any(trial.failures for trial in trials) else 0


if __name__ == "__main__":
    sys.exit(main())
