"""Tables of components: a class by the name that a configuration gives it, imported when it is asked for.

A name is one of the table's, or the place of a class of the user's own, `package.module:Class`, on PYTHONPATH
or in the folder where the program is started. Imports no torch.
"""

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from pydantic import create_model

from sage.config import ConfigError, Named

Kind = TypeVar("Kind")


class ComponentTable(Mapping[str, type[Kind]], Generic[Kind]):
    """name -> class. Iterates over its own names; of a class of the user's own only `in` and [] know."""

    def __init__(self, base: str, places: Mapping[str, str]) -> None:
        """base: "module:Class" that every component extends; places: name -> "module:Class"."""
        self._base, self._places = base, dict(places)

    def __getitem__(self, name: str) -> type[Kind]:
        """Import a component. Raises ConfigError, in one line, where it is missing or of another kind."""
        if name in self._places:
            component: type[Kind] = _imported(self._places[name])
            return component
        if ":" not in name:
            raise KeyError(name)
        if str(Path.cwd()) not in sys.path:
            sys.path.append(str(Path.cwd()))
        return self._checked(_imported(name))

    def __contains__(self, name: object) -> bool:
        return name in self._places or (isinstance(name, str) and ":" in name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _checked(self, component: Any) -> type[Kind]:
        base: type[Kind] = _imported(self._base)
        if not isinstance(component, type) or not issubclass(component, base):
            raise ConfigError(f"expected a subclass of {self._base.replace(':', '.')}, got {component!r}")
        if missing := sorted(getattr(component, "__abstractmethods__", ())):
            raise ConfigError(f"{component.__name__} does not define {', '.join(missing)}")
        settings = getattr(component, "Settings", None)
        if not inspect.isclass(settings) or not issubclass(settings, Named):
            raise ConfigError(f"{component.__name__}.Settings: expected a subclass of sage.config.Named")
        return component


class SettingsTable(Mapping[str, type[Named]]):
    """name -> the settings of a table's component, which is imported when it is asked for."""

    def __init__(self, components: Mapping[str, Any]) -> None:
        self._components = components

    def __getitem__(self, name: str) -> type[Named]:
        settings: type[Named] = self._components[name].Settings
        if ":" not in name:
            return settings
        # the name in the configuration is the class's place, whatever the class calls itself
        return create_model(settings.__name__, __base__=settings, name=(Literal[name], name))  # type: ignore[arg-type]

    def __contains__(self, name: object) -> bool:
        return name in self._components

    def __iter__(self) -> Iterator[str]:
        return iter(self._components)

    def __len__(self) -> int:
        return len(self._components)


def _imported(place: str) -> Any:
    """The class at "package.module:Class". Raises ConfigError, in one line."""
    module_name, _, class_name = place.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # a user's module may fail in any way
        reason = str(error).splitlines()[0] if str(error) else ""
        raise ConfigError(f"cannot import {module_name}: {type(error).__name__}: {reason}") from error
    if not hasattr(module, class_name):
        raise ConfigError(f"{module_name} has no class {class_name}")
    return getattr(module, class_name)
