"""One YAML file, plus key.path=value overrides, into frozen pydantic models. Imports no torch.

Every component's settings are a subclass of Settings, in the same file as the component; a default is written
there and nowhere else. A bad value is a ConfigError whose every line names the path, the value and what was
expected.
"""

import difflib
import types
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from sage import yamlfile
from sage.yamlfile import ConfigError


class Settings(BaseModel):
    """The base of every component's settings: frozen, strict about types, unknown keys forbidden."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Named(Settings):
    """The settings of a component that is chosen by its name."""

    name: str


Tables = Mapping[str, Mapping[str, type[Named]]]
"""section -> name -> settings: which components a section's `name` may choose."""
Schema = TypeVar("Schema", bound=Settings)


# --- reading --------------------------------------------------------------------------------------


def load(path: Path, overrides: list[str], schema: type[Schema], tables: Tables) -> Schema:
    """The settings in a file with overrides applied.

    An override of `reducer.name` chooses another component: of the file's section the keys that the new one
    knows are kept, the others are dropped. Raises ConfigError.
    """
    raw = yamlfile.read(path)
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {_shown(raw)}")
    changes = [_parse_override(override) for override in overrides]
    names = {keys[0]: value for keys, value in changes if keys[1:] == ["name"]}  # the last one counts
    for section, name in names.items():
        _choose(raw, section, name, tables.get(section, {}))
    for keys, value in changes:
        _assign(raw, keys, value)
    return validate(raw, schema, tables)


def validate(raw: dict[str, Any], schema: type[Schema], tables: Tables) -> Schema:
    """The settings in a mapping as a YAML file gives it. Raises ConfigError."""
    complaints = _Complaints()
    components = {
        section: _component(section, raw[section], table, complaints)
        for section, table in tables.items()
        if section in raw
    }
    try:
        settings = schema.model_validate({**raw, **components})
    except ValidationError as error:
        complaints.add_all(error, schema, "")
    if text := complaints.text():
        raise ConfigError(text)
    return settings


def to_yaml(settings: Settings) -> str:
    """The resolved configuration; loading it gives equal settings."""
    return yamlfile.dump(settings.model_dump(mode="json"))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"task": {"name": "cnn"}} as {"task.name": "cnn"}; empty for a value that is not a mapping."""
    flat: dict[str, Any] = {}
    for key, value in tree.items() if isinstance(tree, dict) else ():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def one_line(value: Any) -> str:
    """A value in one line of YAML, as an override takes it."""
    return yamlfile.dump(value, on_one_line=True).strip().removesuffix("...").strip()


def _component(section: str, raw: Any, table: Mapping[str, type[Named]], complaints: "_Complaints") -> Named:
    """A section's settings; where they are wrong, a complaint is added and empty ones are returned."""
    if not isinstance(raw, dict) or "name" not in raw:
        message = f"expected a mapping with a name, one of {_listed(table)}, got {_shown(raw)}"
        complaints.add(section, message)
    elif not isinstance(raw["name"], str) or raw["name"] not in table:
        message = f"expected one of {_listed(table)}, got {_shown(raw['name'])}{_hint(raw['name'], table)}"
        complaints.add(f"{section}.name", message)
    else:
        return _validated(section, raw, table, complaints) or Named(name="")
    return Named(name="")


def _validated(
    section: str, raw: dict[str, Any], table: Mapping[str, type[Named]], complaints: "_Complaints"
) -> Named | None:
    try:
        model = table[raw["name"]]
    except ConfigError as error:  # a class of the user's own that cannot be used
        complaints.add(f"{section}.name", f"{_shown(raw['name'])}: {error}")
        return None
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        complaints.add_all(error, model, f"{section}.")
        return None


def _choose(raw: dict[str, Any], section: str, name: Any, table: Mapping[str, type[Named]]) -> None:
    """Keep of a section what the component of another name knows; validate complains of an unknown one."""
    before = raw.get(section)
    if not isinstance(before, dict) or before.get("name") == name:
        return
    if isinstance(name, str) and name in table:
        with suppress(ConfigError):  # a class that cannot be imported
            known = table[name].model_fields
            raw[section] = {key: value for key, value in before.items() if key in known}


def _parse_override(override: str) -> tuple[list[str], Any]:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"{override}: expected an override of the form key.path=value")
    return path.split("."), yamlfile.parse(text, override)


def _assign(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ConfigError(
                f"{'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is {_shown(raw)}, not a mapping"
            )
    raw[keys[-1]] = value


# --- error messages --------------------------------------------------------------------------------


class _Complaints:
    """One line for each bad path, however many alternatives of its type pydantic tried."""

    def __init__(self) -> None:
        self._lines: dict[str, str] = {}
        self._missing: set[str] = set()
        self._meant: set[str] = set()

    def add(self, path: str, message: str) -> None:
        self._lines.setdefault(path, f"{path}: {message}")

    def add_all(self, error: ValidationError, model: type[BaseModel], prefix: str) -> None:
        """Add the lines of a pydantic error about a model. prefix: of the model's keys, "task." say."""
        for problem in error.errors():
            owner, field, keys = _find(model, problem["loc"])
            path = (prefix + ".".join(keys)).rstrip(".")
            if field is None and problem["loc"]:
                self._add_unknown(path, keys[-1], owner)
            elif problem["type"] == "missing" and len(keys) == len(problem["loc"]):
                self._missing.add(path)
                self.add(path, f"missing; expected {expected(field)}")
            elif problem["type"] == "value_error":
                self.add(path, str(problem["ctx"]["error"]))
            else:
                message = f"expected {expected(field)}, got {_shown(problem['input'])}"
                self.add(path, message + _hint(problem["input"], _choices(field)))

    def text(self) -> str:
        """All lines; a key that is missing because it is misspelt has one line, not two."""
        kept = [line for path, line in self._lines.items() if path not in self._missing & self._meant]
        return "\n".join(kept)

    def _add_unknown(self, path: str, key: str, owner: type[BaseModel]) -> None:
        meant = difflib.get_close_matches(key, owner.model_fields, n=1)
        self._meant |= {path.removesuffix(key) + name for name in meant}
        message = f"did you mean {meant[0]}?" if meant else f"expected one of {_listed(owner.model_fields)}"
        self.add(path, f"unknown key; {message}")


def _hint(value: Any, names: Iterable[str]) -> str:
    """The most similar of the names, as the end of a message; empty where none is similar."""
    meant = difflib.get_close_matches(value, names, n=1) if isinstance(value, str) else []
    return f"; did you mean {meant[0]}?" if meant else ""


def _choices(field: FieldInfo | None) -> tuple[str, ...]:
    return get_args(field.annotation) if field and get_origin(field.annotation) is Literal else ()


def _find(
    model: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[type[BaseModel], FieldInfo | None, list[str]]:
    """Follow an error's location down the models: the model, its field (None: unknown key), the keys."""
    keys: list[str] = []
    field: FieldInfo | None = None
    for part in map(str, loc):
        keys.append(part)
        field = model.model_fields.get(part)
        inner = _model_of(field.annotation) if field else None
        if inner is None:
            break
        if len(keys) < len(loc):
            model = inner
    return model, field, keys


def _model_of(kind: Any) -> type[BaseModel] | None:
    """The model that a field holds, where it holds one, or one or null."""
    models = [
        part
        for part in (get_args(kind) if get_origin(kind) in (Union, types.UnionType) else [kind])
        if isinstance(part, type) and issubclass(part, BaseModel)
    ]
    return models[0] if len(models) == 1 else None


def expected(field: FieldInfo | None) -> str:
    return "something else" if field is None else _describe(field.annotation, field.metadata)


def _describe(kind: Any, limits: list[Any]) -> str:
    """What a field takes, in words: 'a number in (0, 1]'."""
    origin = get_origin(kind)
    if origin is Annotated:
        inner, *metadata = get_args(kind)
        return _describe(inner, [part for item in metadata for part in getattr(item, "metadata", [item])])
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(part, limits) for part in get_args(kind))
    if origin is Literal:
        return _listed(get_args(kind), "one of ") if len(get_args(kind)) > 1 else str(get_args(kind)[0])
    if origin is list:
        return f"a list, each {_describe(get_args(kind)[0], [])}"
    if origin is tuple:
        first, *others = get_args(kind)
        count = "" if Ellipsis in others else f"{1 + len(others)} of them, "
        return f"a list, {count}each {_describe(first, [])}"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with keys of {_listed(kind.model_fields)}"
    if origin is dict:
        return "a mapping"
    names = {float: "a number", int: "an integer", bool: "true or false", str: "a text", type(None): "null"}
    return names.get(kind, str(kind)) + (_interval(limits) if kind in (int, float) else "")


def _interval(limits: list[Any]) -> str:
    low, high, opening, closing = "-inf", "inf", "(", ")"
    for limit in limits:
        if isinstance(limit, annotated_types.Ge):
            low, opening = f"{limit.ge:g}", "["
        elif isinstance(limit, annotated_types.Gt):
            low = f"{limit.gt:g}"
        elif isinstance(limit, annotated_types.Le):
            high, closing = f"{limit.le:g}", "]"
        elif isinstance(limit, annotated_types.Lt):
            high = f"{limit.lt:g}"
    return f" in {opening}{low}, {high}{closing}" if (low, high) != ("-inf", "inf") else ""


def _listed(names: Any, before: str = "") -> str:
    return before + ", ".join(map(str, names))


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else one_line(value)
    return text if len(text) <= 60 else text[:57] + "..."
