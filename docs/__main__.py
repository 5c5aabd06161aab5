"""Write docs/settings.md: every setting, from the classes of the settings."""

import inspect
from pathlib import Path
from typing import Any

from run import COMPONENTS, TABLES
from sage import files
from sage.reference import settings_page
from sage.sweep import Sweep
from sage.training.settings import RunSettings

PAGE = Path(__file__).parent / "settings.md"


def make_page() -> str:
    """The page's content. Imports every component."""
    summaries = {
        section: {name: first_paragraph(table[name]) for name in table}
        for section, table in COMPONENTS.items()
    }
    return settings_page(RunSettings, TABLES, Sweep, summaries)


def first_paragraph(component: Any) -> str:
    """What a class says of itself first, in one line; empty where it says nothing of its own."""
    text = inspect.cleandoc(vars(component).get("__doc__") or "")
    return " ".join(text.split("\n\n")[0].split())


if __name__ == "__main__":
    files.write_text(PAGE, make_page())
