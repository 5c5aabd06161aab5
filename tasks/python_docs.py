"""An LSTM on the text of Python's own language reference: language modelling without a download."""

from pathlib import Path
from typing import ClassVar, Literal

from sage.config import Named
from tasks.data import python_docs
from tasks.data.text import Text
from tasks.language import LanguageModelling, LanguageSettings


class PythonDocsSettings(LanguageSettings):
    name: Literal["python_docs"] = "python_docs"


class PythonDocs(LanguageModelling):
    """The topics of pydoc, split by topic."""

    Settings: ClassVar[type[Named]] = PythonDocsSettings

    @classmethod
    def read(cls, config: PythonDocsSettings, data: Path) -> Text:
        return python_docs.read()
