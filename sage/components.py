"""Tables of components: a class by the name that a configuration gives it, imported when it is looked up.

A name is one of the table's, or the place of a user's own class, `package.module:Class`, on PYTHONPATH or in
the folder where the program is started. Imports no torch.
"""

import importlib
import inspect
import sys
import traceback
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import create_model

from sage.config import ConfigError, Named
from sage.console import first_line

Kind = TypeVar("Kind")


class ComponentTable(Mapping[str, type[Kind]], Generic[Kind]):
    """name -> class. Iterating yields the table's own names; `in` and [] also take a class's place."""

    def __init__(self, base: str, places: Mapping[str, str]) -> None:
        """base: "module:Class" that every component extends; places: name -> "module:Class"."""
        self._base, self._places = base, dict(places)

    def __getitem__(self, name: str) -> type[Kind]:
        """Import a component. Raises ConfigError, in one line, where that fails or it is of another kind."""
        if name not in self:
            raise KeyError(name)
        if name not in self._places:
            _search_here()
        component = _imported(self._places.get(name, name))
        base: type[Kind] = _imported(self._base)
        if not inspect.isclass(component) or not issubclass(component, base):
            raise ConfigError(f"expected a subclass of {self._base.replace(':', '.')}, got {component!r}")
        _check_complete(component)
        return component

    def __contains__(self, name: object) -> bool:
        return name in self._places or (isinstance(name, str) and ":" in name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class SettingsTable(Mapping[str, type[Named]]):
    """name -> the settings of a table's component, which is imported when it is looked up."""

    def __init__(self, components: Mapping[str, Any]) -> None:
        self._components = components

    def __getitem__(self, name: str) -> type[Named]:
        settings: type[Named] = self._components[name].Settings
        return _settings_named(settings, name) if ":" in name else settings

    def __contains__(self, name: object) -> bool:
        return name in self._components

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)


@cache  # settings of two classes are never equal, so that a run would not find itself again
def _settings_named(settings: type[Named], name: str) -> type[Named]:
    """The settings with a class's place as their name, whatever name their own class has."""
    own_name: Any = (Literal[name], name)  # its type and its default
    return create_model(settings.__name__, __base__=settings, name=own_name)


def _search_here() -> None:
    """Find modules in the folder where the program is started, after all other places."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _imported(place: str) -> Any:
    """The class at "package.module:Class". Raises ConfigError, in one line."""
    module_name, _, class_name = place.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), class_name)):
        raise ConfigError("expected package.module:Class")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a user's module may fail in any way
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"cannot import {module_name}{_line_of(error)}: {reason}") from error
    if not hasattr(module, class_name):
        file = getattr(module, "__file__", None)
        raise ConfigError(f"the module {module_name} ({file}) has no class {class_name}")
    return getattr(module, class_name)


def _line_of(error: BaseException) -> str:
    """Where the import failed: the line of the imported file itself; nothing where there is no such file."""
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename not in (__file__, importlib.__file__) and not frame.filename.startswith("<"):
            return f" ({frame.filename}, line {frame.lineno})"
    return ""


def _check_complete(component: Any) -> None:
    """Raise ConfigError, in one line, where a component lacks what its base demands."""
    if missing := sorted(getattr(component, "__abstractmethods__", ())):
        raise ConfigError(f"{component.__name__} does not define {', '.join(missing)}")
    settings = getattr(component, "Settings", None)
    if not inspect.isclass(settings) or not issubclass(settings, Named):
        found = "is missing" if settings is None else f"is {settings!r}"
        owner = f"{component.__name__}.Settings"
        raise ConfigError(f"expected {owner} to be a subclass of sage.config.Named; it {found}")
