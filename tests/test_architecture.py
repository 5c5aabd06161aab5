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
    "reducers.schedule",
    "reducers.quantize",
    "reducers.sparse",
    "reducers.spectral",
    "tasks.classification",
    "tasks.language",
    "tasks.recommendation",
}
"""What a family shares; also everything under tasks.models and tasks.data."""

BASE = {
    "interfaces",
    "config",
    "clock",
    "board",
    "room",
    "rendezvous",
    "worker",
    "files",
    "signals",
    "manifest",
}
MIDDLE = {
    "comm",
    "launch",
    "gradient",
    "feedback",
    "optim",
    "metrics",
    "record",
    "checkpoint",
    "guard",
    "settings",
}
MAY_IMPORT: dict[str, set[str]] = {
    **{name: set() for name in (*BASE, "provenance", "__init__")},
    "board": {"interfaces"},
    "room": {"interfaces"},
    "rendezvous": {"interfaces"},
    "worker": {"interfaces", "rendezvous"},
    **{name: BASE for name in MIDDLE},
    "files": set(),
    "signals": set(),
    "manifest": {"config"},  # which checkpoint to go on from: the command line answers without torch
    "record": {*BASE, "metrics"},
    "metrics": BASE,
    "checkpoint": {*BASE, "metrics"},
    "guard": {*BASE, "gradient"},
    "settings": {*BASE, "checkpoint", "feedback", "optim", "record"},
    "state": {*BASE, "checkpoint"},
    "train": {*BASE, *MIDDLE, "state"},
    "simulate": {*BASE, *MIDDLE, "train"},
    "preview": {*BASE, *MIDDLE, "train"},
    "sweep": {"config"},  # points are configurations; the report and the command line find them without torch
    "cli": {
        "config",
        "sweep",
        "files",
        "manifest",
        "signals",
    },  # nothing that imports torch: --help answers at once
    "experiment": BASE
    | MIDDLE
    | {"train", "simulate", "sweep", "provenance"},  # one run, put together from all parts
    "runs": {"config"},  # the report: reads what runs left ...
    "tables": {"runs"},
    "figures": {"runs", "tables"},
    "report": {"config", "runs", "tables", "figures", "sweep", "cli"},  # ... and shows it
}


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


def ours(path: Path) -> set[str]:
    """The files of ours that a file imports, as module names."""
    known = {module_of(source) for source in SOURCES} | {"reducers", "tasks"}
    return {name for name in imports_of(path) if name in known}


def test_every_source_file_is_seen() -> None:
    assert {"run", "sage.train", "reducers.sage", "tasks.digits", "tasks.models.resnet"} <= set(
        map(module_of, SOURCES)
    )


@pytest.mark.parametrize("path", sorted((ROOT / "sage").glob("*.py")), ids=module_of)
def test_the_engine_imports_what_its_place_allows(path: Path) -> None:
    assert ours(path) - {"sage"} <= {f"sage.{name}" for name in MAY_IMPORT[path.stem]}


@pytest.mark.parametrize(
    "path",
    [path for part in ("reducers", "tasks") for path in sorted((ROOT / part).rglob("*.py"))],
    ids=module_of,
)
def test_a_reducer_or_task_imports_the_interfaces_and_what_its_family_shares(path: Path) -> None:
    family = module_of(path).split(".")[0]
    for name in ours(path) - {"sage", "sage.interfaces", "sage.config"}:
        assert name.startswith(f"{family}."), f"{path} imports {name}"
        is_shared = name in SHARED or name.startswith(("tasks.models", "tasks.data"))
        assert is_shared or path.stem == "__init__", f"{path} imports its sibling {name}"


def test_nobody_imports_run() -> None:
    assert not [path for path in SOURCES if "run" in ours(path)]


@pytest.mark.parametrize(
    "name", ["config", "sweep", "files", "signals", "manifest", "cli", "runs", "tables", "figures", "report"]
)
def test_what_answers_at_once_imports_no_torch(name: str) -> None:
    """By the table above, none of these imports a file of ours that does."""
    imported = imports_of(ROOT / f"sage/{name}.py")
    assert not [module for module in imported if module.split(".")[0] == "torch"]
    torchless = {"config", "sweep", "files", "signals", "manifest", "runs", "tables", "figures", "cli"}
    assert MAY_IMPORT[name] <= torchless


def uses(path: Path, owner: str, attribute: str) -> bool:
    return any(
        isinstance(node, ast.Attribute)
        and node.attr == attribute
        and isinstance(node.value, ast.Name)
        and node.value.id == owner
        for node in ast.walk(ast.parse(path.read_text()))
    )


def test_torch_distributed_appears_in_launch_and_comm_only() -> None:
    users = {
        module_of(path)
        for path in SOURCES
        if uses(path, "torch", "distributed")
        or any(name.startswith("torch.distributed") for name in imports_of(path))
    }
    assert users == {"sage.launch", "sage.comm"}


def test_the_environment_is_read_in_launch_only() -> None:
    users = {
        module_of(path)
        for path in SOURCES
        if uses(path, "os", "environ") or uses(path, "os", "getenv") or "os.environ" in imports_of(path)
    }
    assert users == {"sage.launch"}


def test_the_composition_root_stays_small() -> None:
    assert len((ROOT / "run.py").read_text().splitlines()) <= 80


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_file_stays_under_300_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 300


def pins(text: str) -> set[str]:
    return {line.strip().removeprefix("- ") for line in text.splitlines() if "==" in line and "#" not in line}


def test_pip_and_conda_install_the_same_pins() -> None:
    requirements = pins((ROOT / "requirements.txt").read_text())
    assert requirements == pins((ROOT / "environment.yml").read_text())
    assert len(requirements) >= 8
