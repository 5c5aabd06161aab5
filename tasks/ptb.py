"""An LSTM on Penn Treebank."""

from typing import ClassVar, Literal

from sage.config import Named
from tasks.data.ptb import PTB
from tasks.language import CorpusModelling, CorpusSettings


class PennTreebankSettings(CorpusSettings):
    name: Literal["ptb"] = "ptb"


class PennTreebank(CorpusModelling):
    """Penn Treebank."""

    Settings: ClassVar[type[Named]] = PennTreebankSettings
    corpus = PTB
