"""One YAML file, plus key.path=value overrides, into frozen pydantic models. Imports no torch.

Every component's settings are a subclass of Settings that stands beside its owner; a field's default is its
only home. A bad value is a ConfigError whose every line names the path, the value and what was expected.
"""

import difflib
import re
import types
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line an error."""


class Settings(BaseModel):
    """The base of every component's settings: frozen, strict about types, unknown keys forbidden."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Named(Settings):
    """The settings of a component that is chosen by its name."""

    name: str


Tables = dict[str, dict[str, type[Named]]]
"""section -> name -> settings: which components a section's `name` may choose."""
Schema = TypeVar("Schema", bound=Settings)


# --- reading --------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """SafeLoader, but 1e-3 is a number (YAML 1.1 wants 1.0e-3)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise ConfigError(f"{origin}: not valid YAML{where}: {problem}") from None


def load(path: Path, overrides: list[str], schema: type[Schema], tables: Tables) -> Schema:
    """The settings in a file with overrides applied.

    An override of `reducer.name` chooses another component: of the file's section the keys that the new one
    knows are kept, the others are dropped. Raises ConfigError.
    """
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise ConfigError(f"{path}: cannot read the configuration: {reason}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values, got {_shown(raw)}")
    changes = [_parse_override(override) for override in overrides]
    for keys, value in changes:
        if len(keys) == 2 and keys[1] == "name" and isinstance(value, str) and keys[0] in tables:
            _choose(raw, keys[0], value, tables[keys[0]])
    for keys, value in changes:
        _assign(raw, keys, value)
    return validate(raw, schema, tables)


def validate(raw: dict[str, Any], schema: type[Schema], tables: Tables) -> Schema:
    """The settings in a mapping as a YAML file gives it. Raises ConfigError."""
    errors: list[str] = []
    raw = dict(raw)
    for section, table in tables.items():
        if section not in raw:
            errors.append(f"{section}: missing; expected a mapping with a name, one of {_listed(table)}")
        elif (component := _component(section, raw[section], table, errors)) is not None:
            raw[section] = component
        else:
            raw.pop(section)
    reported = {section for section in tables if section not in raw}
    try:
        settings = schema.model_validate(raw)
    except ValidationError as error:
        lines = [line for line in _lines(error, schema, "") if line.split(":")[0] not in reported]
        raise ConfigError("\n".join(errors + lines)) from None
    if errors:
        raise ConfigError("\n".join(errors))
    return settings


def to_yaml(settings: Settings) -> str:
    """The resolved configuration; loading it gives equal settings."""
    return yaml.safe_dump(
        settings.model_dump(mode="json"), sort_keys=False, default_flow_style=None, width=100
    )


def _component(section: str, raw: Any, table: dict[str, type[Named]], errors: list[str]) -> Named | None:
    if not isinstance(raw, dict) or "name" not in raw:
        errors.append(
            f"{section}: expected a mapping with a name, one of {_listed(table)}, got {_shown(raw)}"
        )
        return None
    name = raw["name"]
    if not isinstance(name, str) or name not in table:
        nearest = difflib.get_close_matches(str(name), table, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        errors.append(f"{section}.name: expected one of {_listed(table)}, got {_shown(name)}{hint}")
        return None
    try:
        return table[name].model_validate(raw)
    except ValidationError as error:
        errors.extend(_lines(error, table[name], f"{section}."))
        return None


def _choose(raw: dict[str, Any], section: str, name: str, table: dict[str, type[Named]]) -> None:
    before = raw.get(section)
    if isinstance(before, dict) and name in table and before.get("name") != name:
        raw[section] = {key: value for key, value in before.items() if key in table[name].model_fields}


def _parse_override(override: str) -> tuple[list[str], Any]:
    path, equals, text = override.partition("=")
    if not equals or not all(path.split(".")):
        raise ConfigError(f"{override}: expected an override of the form key.path=value")
    return path.split("."), read_yaml(text, override)


def _assign(raw: dict[str, Any], keys: list[str], value: Any) -> None:
    for depth, key in enumerate(keys[:-1]):
        raw = raw.setdefault(key, {})
        if not isinstance(raw, dict):
            raise ConfigError(
                f"{'.'.join(keys)}: {'.'.join(keys[: depth + 1])} is {_shown(raw)}, not a mapping"
            )
    raw[keys[-1]] = value


# --- saying what is wrong -------------------------------------------------------------------------


def _lines(error: ValidationError, model: type[BaseModel], prefix: str) -> list[str]:
    """One line a bad field, however many alternatives of its type pydantic tried."""
    lines: dict[str, str] = {}
    for problem in error.errors():
        owner, field, keys = _find(model, problem["loc"])
        path = (prefix + ".".join(keys)).rstrip(".")
        if problem["type"] == "extra_forbidden":
            nearest = difflib.get_close_matches(keys[-1], owner.model_fields, n=1)
            hint = (
                f"did you mean {nearest[0]}?" if nearest else f"expected one of {_listed(owner.model_fields)}"
            )
            lines[path] = f"{path}: unknown key; {hint}"
        elif problem["type"] == "missing":
            lines[path] = f"{path}: missing; expected {_expected(field)}"
        elif problem["type"] == "value_error":
            lines[path] = f"{path}: {problem['ctx']['error']}"
        else:
            lines.setdefault(path, f"{path}: expected {_expected(field)}, got {_shown(problem['input'])}")
    return list(lines.values())


def _find(
    model: type[BaseModel], loc: tuple[int | str, ...]
) -> tuple[type[BaseModel], FieldInfo | None, list[str]]:
    """Follow an error's location down the models: the model, its field (None: unknown key), the keys."""
    keys: list[str] = []
    field: FieldInfo | None = None
    for part in map(str, loc):
        keys.append(part)
        field = model.model_fields.get(part)
        if field is None or not (
            isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        ):
            break
        if len(keys) < len(loc):
            model = field.annotation
    return model, field, keys


def _expected(field: FieldInfo | None) -> str:
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
    if origin is tuple:
        return "a list of numbers"
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return f"a mapping with keys of {_listed(kind.model_fields)}"
    names = {float: "a number", int: "an integer", bool: "true or false", str: "a text", type(None): "null"}
    return (
        (names.get(kind, str(kind)) + _interval(limits))
        if kind in (int, float)
        else names.get(kind, str(kind))
    )


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
    text = (
        repr(value)
        if isinstance(value, str)
        else yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
    )
    text = text.removesuffix("\n...").removesuffix("...").strip()
    return text if len(text) <= 60 else text[:57] + "..."
