"""An LSTM on WikiText-2."""

from pathlib import Path
from typing import ClassVar, Literal

from sage.config import Named
from tasks.data.text import Text, TokenizerName
from tasks.data.wikitext2 import WIKITEXT2
from tasks.language import LanguageModelling, LanguageSettings


class WikiText2Settings(LanguageSettings):
    name: Literal["wikitext2"] = "wikitext2"
    tokenizer: TokenizerName = "spacy"
    """spacy: spaCy's English tokens, lower-cased (the published form); whitespace: the corpus's own."""


class WikiText2(LanguageModelling):
    """WikiText-2 as its preparation left it."""

    Settings: ClassVar[type[Named]] = WikiText2Settings

    @classmethod
    def read(cls, config: WikiText2Settings, data: Path) -> Text:
        return WIKITEXT2.read(data, config.tokenizer)
