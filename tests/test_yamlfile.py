"""YAML: numbers as in YAML 1.2, nothing that makes a small text large, what is written is read back."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sage import yamlfile
from sage.yamlfile import ConfigError, dump, parse, read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("08", 8),
        ("-012", -12),
        ("+3", 3),
        ("0o17", 15),
        ("0xff", 255),
        ("0b11", "0b11"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("1.5E+3", 1500.0),
        ("-.inf", -math.inf),
        ("+.Inf", math.inf),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("on", "on"),
        ("no", "no"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2020-01-01", "2020-01-01"),
        ("'010'", "010"),
        ("<<", "<<"),
        ("=", "="),
        ("inf", "inf"),
        ("nan", "nan"),
        ("e5", "e5"),
        ("a: [1, {b: 2.5}]", {"a": [1, {"b": 2.5}]}),
    ],
)
def test_a_text_is_the_value_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse(text, "here")
    assert found == value
    assert type(found) is type(value)
    again = parse(dump(value), "there")
    assert (again, type(again)) == (value, type(value))
    assert parse(dump({"a": [value]}, on_one_line=True), "there") == {"a": [value]}


def test_nan_is_a_number_too() -> None:
    assert math.isnan(parse(".nan", "here"))
    assert math.isnan(parse(dump(math.nan), "here"))


@pytest.mark.parametrize(
    "value", ["010", "08", "1:30", "1e5", "1.5", "0o7", "null", "true", "", "~", ".inf", "- a", "a: b"]
)
def test_a_text_that_looks_like_something_else_is_read_back_as_a_text(value: str) -> None:
    assert parse(dump({"a": value}), "here") == {"a": value}


def bomb(depth: int) -> str:
    """Each level holds the one before nine times; with merge keys, or with lists."""
    lines = ["a0: &a0 {k: 1}"]
    for level in range(1, depth):
        lines.append(f"a{level}: &a{level} [" + ", ".join([f"*a{level - 1}"] * 9) + "]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(9), r"line 1\): anchors and aliases \(& and \*\) are not supported"),
        ("a: &x {b: 1}\nc: {<<: *x}", "anchors and aliases"),
        ("a: *x", "anchors and aliases"),
        ("a: 1\na: 2", r"line 2\): the key a is given twice"),
        ("? [1, 2]\n: 3", "a key must be a text"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("[" * 5000, "brackets are nested too deep"),
        ("a: [1", "not valid YAML"),
        ("\x00", "not valid YAML"),
        ("!!timestamp never", "not valid YAML"),
        ("a: " + "x" * 2_000_000, "expected at most 1,000,000 characters, got 2,000,003"),
    ],
)
def test_what_is_refused_is_one_line_at_once(text: str, message: str) -> None:
    started = time.monotonic()
    with pytest.raises(ConfigError, match=f"^here: .*{message}") as error:
        parse(text, "here")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) <= 60 + yamlfile.MAX_PROBLEM
    assert time.monotonic() - started < 30  # PyYAML itself would take for ever


def test_a_merge_key_without_an_anchor_is_a_key() -> None:
    assert parse("a: {<<: {b: 1}}", "here") == {"a": {"<<": {"b": 1}}}


def test_a_file_is_read_up_to_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_bytes(b"# " + b"x" * 10_000_000)
    with pytest.raises(ConfigError, match=r"a\.yaml: expected at most 1,000,000 bytes, got more"):
        read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not a text file"):
        read(path)
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "b.yaml")
    path.write_text("a: 1\n")
    assert read(path) == {"a": 1}


def test_plain_pyyaml_reads_what_is_written() -> None:
    """For a user's own scripts, where both versions agree."""
    value = {"a": [1, 2.5, "text", None, True], "b": {"c": 1e-5}}
    assert yaml.safe_load(dump(value)) == value
