"""An LSTM on WikiText-2."""

from typing import ClassVar, Literal

from sage.config import Named
from tasks.data.wikitext2 import WIKITEXT2
from tasks.language import CorpusModelling, CorpusSettings


class WikiText2Settings(CorpusSettings):
    name: Literal["wikitext2"] = "wikitext2"


class WikiText2(CorpusModelling):
    """WikiText-2."""

    Settings: ClassVar[type[Named]] = WikiText2Settings
    corpus = WIKITEXT2
