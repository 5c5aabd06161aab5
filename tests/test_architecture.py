"""Who may import whom: the import rules of the design, read off the code."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    ROOT / "run.py",
    *(path for part in ("sage", "reducers", "tasks") for path in (ROOT / part).rglob("*.py")),
]
SHARED = {
    "reducers.common",
    "reducers.lowrank",
    "reducers.largest",
    "reducers.density",
    "reducers.disjoint",
    "reducers.estimate",
    "reducers.quantizer",
    "reducers.vote",
    "reducers.search",
    "reducers.sparse",
    "reducers.spectral",
    "tasks.classification",
    "tasks.language",
    "tasks.recommendation",
}
"""What a family shares; also everything under reducers.kernels, tasks.models and tasks.data."""

LEVELS = [
    {
        "interfaces",
        "draws",
        "network",
        "yamlfile",
        "config",
        "reference",
        "components",
        "files",
        "console",
        "locks",
        "sweep",
    },
    {"exchange", "workers"},
    {"runfolder"},
    {"training"},
    {"cli"},
]
"""The engine's order: a part imports its own files and the levels before its own, never a neighbour."""
REPORT = {"report"} | LEVELS[0]
"""The report reads what runs left on disk, so it needs the ground alone."""
TORCHLESS = [
    "sage/yamlfile.py",
    "sage/config.py",
    "sage/reference.py",
    "sage/components.py",
    "sage/console.py",
    "sage/files.py",
    "sage/locks.py",
    "sage/network.py",
    "sage/sweep.py",
    "sage/cli.py",
    "sage/workers/points.py",
    "sage/workers/shares.py",
    "sage/workers/environment.py",
    "sage/workers/signals.py",
    "sage/runfolder/manifest.py",
    "sage/runfolder/resume.py",
    "sage/runfolder/weights.py",
    "sage/report/runs.py",
    "sage/report/tables.py",
    "sage/report/figures.py",
    "sage/report/output.py",
    "sage/report/advice.py",
    "sage/report/__main__.py",
    "reducers/__init__.py",
]
"""What answers at once."""


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports_of(path: Path) -> Iterator[str]:
    """Every module that a file imports, `from a import b` as both a and a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: absolute imports only"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_at_start(path: Path) -> Iterator[str]:
    """The modules that a file imports when it is imported itself, not later in one of its functions."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names))


def ours(path: Path) -> set[str]:
    """The files of ours that a file imports, as module names."""
    known = {module_of(source) for source in SOURCES} | {"reducers", "tasks"}
    return {name for name in imports_of(path) if name in known}


def part_of(name: str) -> str:
    """sage.training.train -> training; sage.config -> config."""
    return name.split(".")[1]


def allowed_parts(part: str) -> set[str]:
    if part == "report":
        return REPORT
    level = next(number for number, parts in enumerate(LEVELS) if part in parts)
    before = set().union(*LEVELS[:level])
    return before | {part} | (LEVELS[0] if level == 0 else set())


def test_every_source_file_is_seen() -> None:
    assert {"run", "sage.training.train", "reducers.sage", "tasks.digits", "tasks.models.resnet"} <= set(
        map(module_of, SOURCES)
    )


@pytest.mark.parametrize(
    "path",
    [p for p in sorted((ROOT / "sage").rglob("*.py")) if p.parent != ROOT / "sage" or p.stem != "__init__"],
    ids=module_of,
)
def test_the_engine_imports_what_comes_before_it(path: Path) -> None:
    imported = {part_of(name) for name in ours(path) if name.startswith("sage.")}
    assert imported <= allowed_parts(part_of(module_of(path)))


@pytest.mark.parametrize(
    "path",
    [path for part in ("reducers", "tasks") for path in sorted((ROOT / part).rglob("*.py"))],
    ids=module_of,
)
def test_a_reducer_or_task_imports_the_interfaces_and_what_its_family_shares(path: Path) -> None:
    family = module_of(path).split(".")[0]
    tables = {"sage.components"} if path.stem == "__init__" else set()
    if module_of(path) == "reducers.__init__":  # what a program of one's own calls
        tables |= {name for name in ours(path) if name.startswith("sage.exchange.")}
    for name in ours(path) - {"sage", "sage.interfaces", "sage.config", "sage.draws", "sage.locks"} - tables:
        assert name.startswith(f"{family}."), f"{path} imports {name}"
        is_shared = name in SHARED or name.startswith(("reducers.kernels", "tasks.models", "tasks.data"))
        assert is_shared or path.stem == "__init__", f"{path} imports its sibling {name}"


def test_nobody_imports_run() -> None:
    assert not [path for path in SOURCES if "run" in ours(path)]


@pytest.mark.parametrize("name", TORCHLESS)
def test_what_answers_at_once_imports_no_torch(name: str) -> None:
    """Nor does anything that it imports, down to the last file."""
    waiting, seen = [ROOT / name], set[Path]()
    while waiting:
        path = waiting.pop()
        seen.add(path)
        assert not [module for module in imports_at_start(path) if module.split(".")[0] == "torch"], path
        files = {ROOT / (module.replace(".", "/") + ".py") for module in imports_at_start(path)}
        waiting += [file for file in files if file.exists() and file not in seen]


def uses(path: Path, owner: str, attribute: str) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_torch_distributed_appears_in_group_comm_and_the_hooks_only() -> None:
    users = {
        module_of(path)
        for path in SOURCES
        if uses(path, "torch", "distributed")
        or any(name.startswith("torch.distributed") for name in imports_of(path))
    }
    assert users == {
        "sage.workers.group",
        "sage.exchange.comm",
        "sage.exchange.absent",
        "sage.exchange.ddp_hook",
        "sage.exchange.fsdp_hook",
    }


def test_the_environment_is_touched_by_those_who_launch_only() -> None:
    users = {
        module_of(path)
        for path in SOURCES
        if uses(path, "os", "environ") or uses(path, "os", "getenv") or "os.environ" in imports_of(path)
    }
    assert users == {f"sage.workers.{name}" for name in ("environment", "launch", "group", "shares")}


def pins(text: str) -> set[str]:
    return {line.strip().removeprefix("- ") for line in text.splitlines() if "==" in line and "#" not in line}


def test_pip_and_conda_install_the_same_pins() -> None:
    requirements = pins((ROOT / "requirements.txt").read_text())
    assert requirements == pins((ROOT / "environment.yml").read_text())
    assert len(requirements) >= 8


def test_the_oldest_environment_differs_in_torch_and_what_follows_from_it() -> None:
    """And it lacks what only checks the code, under the newest torch."""
    newest, oldest = (
        dict(pin.split("==") for pin in pins((ROOT / name).read_text()))
        for name in ("requirements.txt", "requirements-oldest.txt")
    )
    assert {name for name in oldest if oldest[name] != newest.get(name)} == {"torch", "torchvision", "numpy"}
    assert newest.keys() - oldest.keys() == {"ruff", "mypy", "types-PyYAML"}
    assert oldest["torch"] == "2.6.0"
