"""What each setting is for: in a printed configuration, and on the page docs/settings.md."""

import re
from pathlib import Path

import pytest

from docs.__main__ import PAGE, make_page
from run import LOAD_SETTINGS, TABLES, main
from sage import config, yamlfile
from sage.reference import to_commented_yaml
from sage.training.settings import RunSettings

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_printed_configuration_loads_to_itself_and_explains_its_fields(path: Path, tmp_path: Path) -> None:
    settings = LOAD_SETTINGS(path, [])
    text = to_commented_yaml(settings)
    assert yamlfile.parse(text, "printed") == yamlfile.parse(config.to_yaml(settings), "plain")
    printed = tmp_path / "printed.yaml"
    printed.write_text(text)
    assert LOAD_SETTINGS(printed, []) == settings
    comments = [line for line in text.splitlines() if line.lstrip().startswith("#")]
    assert max(map(len, comments)) <= 110
    said = " ".join(line.strip().removeprefix("# ") for line in comments)
    parts = [settings, *(part for _, part in settings if isinstance(part, config.Settings))]
    fields = [field for part in parts for field in type(part).model_fields.values() if field.description]
    assert len(fields) > 20
    assert all(" ".join((field.description or "").split()) in said for field in fields)


def test_comments_are_folded_at_the_width_of_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert main([str(CONFIGS[0]), "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert 50 < max(map(len, printed.splitlines())) <= 60
    wide = to_commented_yaml(LOAD_SETTINGS(CONFIGS[0], []))
    assert yamlfile.parse(printed, "narrow") == yamlfile.parse(wide, "wide")


def test_a_comment_stands_above_its_field() -> None:
    lines = to_commented_yaml(LOAD_SETTINGS(CONFIGS[0], [])).splitlines()
    place = lines.index("  # Steps between two step lines in metrics.jsonl.")
    assert lines[place - 1] == "log:"
    assert lines[place + 1].startswith("  every: ")


def test_the_page_of_the_settings_is_current() -> None:
    assert PAGE.read_text() == make_page(), "make it anew: python -m docs"


def test_the_page_names_every_field_of_every_component() -> None:
    page = PAGE.read_text()
    for section, table in TABLES.items():
        for name in table:
            part = page.split(f"### {section}: {name}\n")[1].split("\n#")[0]
            fields = set(table[name].model_fields) - {"name"}
            missing = {field for field in fields if not re.search(rf"^\| `{field}[`.]", part, re.MULTILINE)}
            assert not missing, (section, name)
    assert "|  |" not in page  # each says what it is for
    for name, field in RunSettings.model_fields.items():
        if name not in TABLES and not isinstance(field.default, config.Settings):
            assert f"| `{name}` |" in page
    assert "| `log.every` | an integer in [1, inf) | `10` |" in page
