"""An LSTM on Penn Treebank."""

from pathlib import Path
from typing import ClassVar, Literal

from sage.config import Named
from tasks.data.ptb import PTB
from tasks.data.text import Text, TokenizerName
from tasks.language import LanguageModelling, LanguageSettings


class PennTreebankSettings(LanguageSettings):
    name: Literal["ptb"] = "ptb"
    tokenizer: TokenizerName = "spacy"
    """spacy: spaCy's English tokens, lower-cased (the published form); whitespace: the corpus's own."""


class PennTreebank(LanguageModelling):
    """Penn Treebank as its preparation left it."""

    Settings: ClassVar[type[Named]] = PennTreebankSettings

    @classmethod
    def read(cls, config: PennTreebankSettings, data: Path) -> Text:
        return PTB.read(data, config.tokenizer)
