"""--evaluate: what the weights that a run has left score. Writes nothing."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sage import files
from sage.console import first_line, say
from sage.interfaces import Task
from sage.runfolder.checkpoint import State, read_state, read_weights
from sage.runfolder.manifest import BEST, FINAL, SHARED
from sage.runfolder.weights import SavedWeights
from sage.training.agree import on_all_workers, wait_for_all
from sage.training.evaluation import values_over_workers
from sage.training.precision import set_up_arithmetic
from sage.training.settings import RunSettings
from sage.training.simulate import WorkerContext, run_single, simulate
from sage.workers import launch
from sage.workers.store import RendezvousStore
from sage.workers.worker import Worker

BuildTask = Callable[[RunSettings, Worker], Task]
Values = dict[str, dict[str, float]]
"""The data that was evaluated, "test" say -> name -> value."""


def read_saved(saved: SavedWeights) -> State:
    """Read the weights, to the CPU. Raises ValueError, in one line, where they are missing or damaged."""
    if saved.checkpoint is None:
        return read_weights(saved.path)
    state = read_state(saved.checkpoint, saved.name)
    weights: State = state["model"] if saved.name == SHARED else state
    return weights


def score(saved: SavedWeights, settings: RunSettings, build_task: BuildTask, worker: Worker) -> int:
    """Score weights on this worker, or on all that this process simulates, and print the values; returns the
    exit code."""
    set_up_arithmetic(settings.deterministic)
    on_worker = partial(_score_on_worker, saved, settings, build_task)
    run = partial(simulate if worker.simulated else run_single, on_worker, worker, settings.timeout_seconds)
    return launch.supervise(worker, settings.timeout_seconds, settings.deterministic, run)


def _score_on_worker(
    saved: SavedWeights,
    settings: RunSettings,
    build_task: BuildTask,
    worker: Worker,
    store: RendezvousStore,
    context: WorkerContext,
) -> None:
    side = context.connect(worker.place.world_size)
    task = build_task(settings, worker)
    context.share(task)
    on_all_workers("weights", lambda: _load(saved, task), store)

    values = {task.evaluated: values_over_workers(task, task.evaluate, side, worker.device)}
    if at_end := values_over_workers(task, task.evaluate_at_end, side, worker.device):
        values["test"] = at_end
    if worker.place.rank == 0:
        say(describe(saved, task, values, worker))
    wait_for_all(side, worker.device)  # rank 0 may host the store: no worker exits before it is done


def _load(saved: SavedWeights, task: Task) -> None:
    try:
        task.model.load_state_dict(read_saved(saved))
    except RuntimeError as error:
        problem = f"expected the weights of this run's model, got others ({first_line(error)})"
        raise ValueError(f"{saved.path}: {problem}") from None


def describe(saved: SavedWeights, task: Task, values: Values, worker: Worker) -> str:
    """The values, and how they compare with what the run has recorded; all digits of them."""
    of_score = values[task.evaluated][task.score]
    lines = [f"{saved.path}{_epoch_of(saved)}"]
    for data, numbers in values.items():
        lines.append(f"{data:<6}" + "".join(f"  {name} {value!r}" for name, value in numbers.items()))
    lines += [f"score   {task.score} {of_score!r}", _compare(saved, of_score, values, worker)]
    return "\n".join(line for line in lines if line)


def _epoch_of(saved: SavedWeights) -> str:
    """After which epoch or step the weights are, in words; empty where that is not on record."""
    if saved.name == SHARED and saved.checkpoint is not None:
        return f": after epoch {saved.checkpoint.manifest.epoch}, step {saved.checkpoint.manifest.step}"
    recorded = _summary_of(saved).get("score", {})
    if saved.name == BEST and "best_epoch" in recorded:
        return f": the best epoch's, epoch {recorded['best_epoch'] + 1}"
    return ""


def _compare(saved: SavedWeights, of_score: float, values: Values, worker: Worker) -> str:
    """Whether the run has recorded the same numbers; empty where it has recorded none of these weights."""
    summary = _summary_of(saved)
    recorded = summary.get("score", {}).get({FINAL: "last", BEST: "best"}.get(saved.name, ""))
    if recorded is None:
        return ""
    same_test = saved.name != FINAL or "test" not in summary or summary["test"] == values.get("test")
    if recorded == of_score and same_test:
        return "the same numbers as in summary.json"
    count, simulated = summary.get("world_size"), summary.get("simulated")
    how = f"{'--simulate' if simulated else '--workers'} {count}"
    if (count, simulated) == (worker.place.world_size, worker.simulated):
        reason = "another device, number of threads or version rounds otherwise"
    else:
        reason = f"it had {count} workers, whose sums round otherwise: {how} divides the data as it did"
    return f"summary.json has the score {recorded!r}: {reason}"


def _summary_of(saved: SavedWeights) -> dict[str, Any]:
    """What the run's summary.json says; empty where it has none, or none that can be read."""
    try:
        summary = files.parse_json(files.read_bytes(saved.run / "summary.json"))
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}
