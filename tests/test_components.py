"""Components by name: the tables' own, and a class of the user's own as package.module:Class."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
import yaml

import run
from reducers import REDUCERS
from sage import config
from sage.components import ComponentTable, SettingsTable
from sage.config import ConfigError
from sage.interfaces import Reducer, Task
from sage.report import groups
from sage.report import runs as report
from sage.training.settings import RunSettings
from sage.workers import launch
from tasks import TASKS

ROOT = Path(__file__).parent.parent
DIGITS = str(ROOT / "configs" / "digits.yaml")
OWN = '''
"""A task and a reducer outside of the repository."""

from pathlib import Path
from typing import Literal

import torch
from pydantic import Field

from sage.config import Named
from sage.interfaces import Reducer, Task


class LineSettings(Named):
    name: Literal["line"] = "line"
    batch_per_worker: int = Field(default=8, ge=1)
    """Points a worker takes in a step."""


class Line(Task):
    Settings = LineSettings
    score, higher_is_better = "loss", False

    def __init__(self, config, data, place, *, seeds, device):
        rng = torch.Generator().manual_seed(0)
        self.x = torch.randn(32, 3, generator=rng).to(device)
        self.model = torch.nn.Linear(3, 1).to(device)
        self.batch_per_worker, self.place = config.batch_per_worker, place
        self.steps_per_epoch = 32 // (config.batch_per_worker * place.world_size)

    @classmethod
    def check(cls, config, data, world_size):
        pass

    def train_batches(self, epoch, start=0):
        for batch in range(start, self.steps_per_epoch):
            first = (batch * self.place.world_size + self.place.rank) * self.batch_per_worker
            x = self.x[first : first + self.batch_per_worker]
            yield x * float("nan") if epoch == 1 and Path("break").exists() else x

    def loss(self, x):
        return (self.model(x) - x.sum(1, keepdim=True)).square().mean()

    @torch.no_grad()
    def evaluate(self):
        return {"loss": (self.loss(self.x).item(), 1.0)}


class MeanSettings(Named):
    name: Literal["mean"] = "mean"


class Mean(Reducer):
    Settings = MeanSettings

    def __init__(self, config, layout, *, seeds, device):
        self.n = layout[-1].stop

    def reduce(self, send, mean, comm):
        mean.copy_(send)
        send.zero_()
        if comm.world_size > 1:
            comm.all_reduce(mean)
            mean.div_(comm.world_size)

    def expected_payload_bytes(self, world_size):
        return 4 * self.n * (world_size > 1)
'''
WORDS = [DIGITS, "task.name=own:Line", "log.tensorboard=false", "log.every=1", "task.batch_per_worker=4"]
Write = Callable[[str, str], None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes modules into the folder in which the program is started; forgets them afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    state = torch.get_rng_state()

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)

    yield write
    torch.set_rng_state(state)
    torch.use_deterministic_algorithms(False)  # as run.main sets it
    for name in set(sys.modules) - before:
        if is_from(sys.modules[name], tmp_path):  # torch's own modules cannot be imported twice
            del sys.modules[name]


def is_from(module: ModuleType, folder: Path) -> bool:
    places = [getattr(module, "__file__", None), *getattr(module, "__path__", [])]
    return any(Path(place).is_relative_to(folder) for place in places if place)


def load(*overrides: str) -> RunSettings:
    return config.load(Path(DIGITS), list(overrides), RunSettings, run.TABLES)


# --- the tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("table", "base"), [(TASKS, Task), (REDUCERS, Reducer)], ids=["tasks", "reducers"])
def test_every_name_of_a_table_is_a_whole_component_whose_settings_have_that_name(
    table: ComponentTable, base: type
) -> None:
    assert len(table) == len(set(table)) > 5
    for name, component in table.items():
        assert issubclass(component, base)
        assert component.Settings.model_fields["name"].default == name


def test_a_name_that_a_table_has_not_is_not_in_it() -> None:
    assert "digits" in TASKS
    assert "digit" not in TASKS
    assert 3 not in TASKS
    with pytest.raises(KeyError):
        TASKS["digit"]


def test_the_settings_of_a_place_are_one_class_that_bears_the_place_as_its_name(write: Write) -> None:
    write("own", OWN)
    table = SettingsTable(TASKS)
    settings = table["own:Line"]
    assert settings is table["own:Line"]  # so that two configurations can be equal
    assert settings(batch_per_worker=3).model_dump() == {"name": "own:Line", "batch_per_worker": 3}
    assert settings.model_fields["batch_per_worker"].description == "Points a worker takes in a step."
    assert list(settings.model_fields) == ["name", "batch_per_worker"]
    assert issubclass(settings, sys.modules["own"].LineSettings)


def test_a_module_is_found_here_and_on_pythonpath_and_ours_come_first(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("tasks", OWN)
    with pytest.raises(ConfigError, match=r"the module tasks .*/tasks/__init__\.py\) has no class Line"):
        TASKS["tasks:Line"]
    (tmp_path / "elsewhere" / "package").mkdir(parents=True)
    (tmp_path / "elsewhere" / "package" / "inside.py").write_text(OWN)
    with pytest.raises(ConfigError, match="No module named 'package'"):
        TASKS["package.inside:Line"]
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert TASKS["package.inside:Line"].__module__ == "package.inside"


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = {  # place -> what the line says
    "missing:Line": "cannot import missing: ModuleNotFoundError: No module named 'missing'",
    "raises:Line": "cannot import raises (FOLDER/raises.py, line 2): ValueError: first line",
    "imports:Line": "cannot import imports (FOLDER/imports.py, line 1): "
    "ModuleNotFoundError: No module named 'missing'",
    "exits:Line": "cannot import exits (FOLDER/exits.py, line 3): SystemExit: 3",
    "slip:Line": "cannot import slip: SyntaxError: invalid syntax (slip.py, line 1)",
    "own:Circle": "the module own (FOLDER/own.py) has no class Circle",
    "own:Mean": "expected a subclass of sage.interfaces.Task, got <class 'own.Mean'>",
    "own:Path": "expected a subclass of sage.interfaces.Task, got <class 'pathlib.Path'>",
    "own:__name__": "expected a subclass of sage.interfaces.Task, got 'own'",
    "own:Partial": "Partial does not define evaluate, loss",
    "own:Bare": "expected Bare.Settings to be a subclass of sage.config.Named; it is missing",
    "own:Odd": "expected Odd.Settings to be a subclass of sage.config.Named; it is <class 'int'>",
    "own:": "expected package.module:Class",
    ":Line": "expected package.module:Class",
    "a b:Line": "expected package.module:Class",
    "..own:Line": "expected package.module:Class",
    "own:Line:Line": "expected package.module:Class",
}
MODULES = {
    "raises": '\nraise ValueError("first line\\nsecond line")',
    "imports": "import missing",
    "exits": "import sys\n\nsys.exit(3)",
    "slip": "class",
    "own": f"""{OWN}

class Partial(Task):
    Settings = LineSettings
    __init__ = check = train_batches = Line.__init__

class Bare(Line):
    Settings = None

class Odd(Line):
    Settings = int
""",
}


@pytest.mark.parametrize("as_override", [True, False], ids=["override", "file"])
@pytest.mark.parametrize("place", MISTAKES)
def test_a_class_that_cannot_be_used_is_one_line_before_any_worker_starts(
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    place: str,
    as_override: bool,
) -> None:
    monkeypatch.setattr(launch, "spawn", lambda *_: pytest.fail("workers were started"))
    for name, text in MODULES.items():
        write(name, text)
    raw = yaml.safe_load(Path(DIGITS).read_text())
    if not as_override:
        raw["task"] = {"name": place, "unknown": 1}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(raw))
    overrides = [f"task.name='{place}'"] if as_override else []
    assert run.main(["own.yaml", *overrides, "--workers", "2"]) == 2
    told = MISTAKES[place].replace("FOLDER", str(tmp_path))
    assert capsys.readouterr() == ("", f"run.py: task.name: '{place}': {told}\n")


def test_a_wrong_value_of_a_class_of_ones_own_is_told_like_any_other(write: Write) -> None:
    write("own", OWN)
    for override, told in (
        ("batch_per_worker=0", "batch_per_worker: expected an integer in [1, inf), got 0"),
        ("batch_per_work=3", "batch_per_work: unknown key; did you mean batch_per_worker?"),
    ):
        with pytest.raises(ConfigError) as caught:
            load("task.name=own:Line", f"task.{override}")
        assert str(caught.value) == f"task.{told}"


def test_another_name_keeps_the_keys_that_a_class_of_ones_own_knows(write: Write) -> None:
    write("own", OWN)
    assert load("task.batch_per_worker=5", "task.name=own:Line").task.model_dump() == {
        "name": "own:Line",
        "batch_per_worker": 5,
    }


# --- from the configuration to the report ---------------------------------------------------------


def test_a_configuration_with_a_class_of_ones_own_prints_and_loads_as_itself(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("own", OWN)
    assert run.main([*WORDS, "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["task"] == {"name": "own:Line", "batch_per_worker": 4}
    (tmp_path / "printed.yaml").write_text(printed)
    assert config.load(tmp_path / "printed.yaml", [], RunSettings, run.TABLES) == load(*WORDS[1:])


def test_a_run_of_ones_own_task_is_resumed_and_reported_by_its_place(
    write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("own", OWN)
    words = [*WORDS, "epochs=2", "--threads", "1"]
    (tmp_path / "break").touch()
    assert run.main(words) == 1
    assert "epoch 1, step 8" in capsys.readouterr().err
    (tmp_path / "break").unlink()
    assert run.main([*words, "--resume"]) == 0
    (folder,) = (tmp_path / "runs" / "digits").iterdir()
    assert json.loads((folder / "summary.json").read_text())["steps"] == 16
    assert report.read_run(folder).workload == "own:Line, world size 1"


def test_two_workers_train_ones_own_task_with_ones_own_reducer_once_in_a_sweep(
    write: Write, tmp_path: Path
) -> None:
    write("own", OWN)
    grid = {"task.name": ["own:Line"], "reducer.name": ["own:Mean"], "epochs": [1]}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"base": DIGITS, "grid": grid, "seeds": [1]}))
    command = [sys.executable, str(ROOT / "run.py"), "--sweep", "sweep.yaml", "--index", "0"]
    command += ["--workers", "2", *WORDS[2:]]
    first = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stderr
    (folder,) = tmp_path.glob("runs/sweep/*/*/")
    assert folder.name.startswith("Mean-s1-")
    assert json.loads((folder / "summary.json").read_text())["world_size"] == 2
    (group,) = groups.gather([report.read_run(folder)])[0].groups
    assert group.label == "own:Mean"
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (again.returncode, again.stdout) == (0, f"{folder.relative_to(tmp_path)}: done already\n")
