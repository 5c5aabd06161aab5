"""YAML as this program reads and writes it: numbers as in YAML 1.2, no anchors, keys once. Imports no torch.

PyYAML reads YAML 1.1, where 010 is eight, 1:30 is ninety and no is false. Here 010 is ten, and the others are
texts.
"""

import copy
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from sage import files

MAX_BYTES = 1_000_000
"""Of a file; the longest configuration of a run has some thousands."""
MAX_PROBLEM = 200
"""Characters of what the parser says."""

# The core schema of YAML 1.2.2, section 10.3.2.
_NULL = re.compile(r"^(null|Null|NULL|~|)$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")
_INT = re.compile(r"^([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$")
_FLOAT = re.compile(
    r"^([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message has one line an error."""


class _Loader(yaml.SafeLoader):
    """Builds mappings, lists, texts, numbers, true, false and null, and refuses what can make a small text
    large."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if getattr(event, "anchor", None) is not None:
            raise yaml.composer.ComposerError(
                problem="anchors and aliases (& and *) are not supported", problem_mark=event.start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    problem="a key must be a text", problem_mark=key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key.value} is given twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        text = str(node.value)
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        # float() knows inf and nan without YAML's point
        return float(re.sub(r"\.(?=[in])", "", str(node.value).lower()))


class _Dumper(yaml.SafeDumper):
    """Writes what the loader reads as the same value."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _kind in (_Loader, _Dumper):
    for _tag, _pattern, _first in (
        ("null", _NULL, ["n", "N", "~", ""]),
        ("bool", _BOOL, list("tTfF")),
        ("int", _INT, list("-+0123456789")),
        ("float", _FLOAT, list("-+.0123456789")),
    ):
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_float)


def parse(text: str, origin: str) -> Any:
    """The value that a YAML text describes. Raises ConfigError, which names the origin."""
    if len(text) > MAX_BYTES:
        raise ConfigError(f"{origin}: expected at most {MAX_BYTES:,} characters, got {len(text):,}")
    return copy.deepcopy(_parsed(text, origin))  # the caller may change what it gets


@lru_cache(maxsize=32)  # a sweep reads one configuration for each of its points
def _parsed(text: str, origin: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    except RecursionError:
        where, problem = "", "brackets are nested too deep"
    except (ValueError, AttributeError, KeyError, TypeError) as error:  # a tag that does not fit, say
        where, problem = "", str(error)
    raise ConfigError(f"{origin}: not valid YAML{where}: {problem[:MAX_PROBLEM]}")


def read(path: Path) -> Any:
    """The value in a file. Raises ConfigError, which names the path, where it cannot be read, is too large or
    is not YAML."""
    try:
        with files.open_regular(path) as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{path}: expected at most {MAX_BYTES:,} bytes, got more")
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: cannot be read: not a text file") from None
    return parse(text, str(path))


def dump(value: Any, *, on_one_line: bool = False) -> str:
    """A value as YAML; parse() reads the same value from it."""
    options: dict[str, Any] = {"default_flow_style": True, "width": 10**6} if on_one_line else {"width": 100}
    options.setdefault("default_flow_style", None)
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, **options)
    return text
