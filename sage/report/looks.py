"""How a reducer is drawn: the same colour, marker and dash in every picture, whatever else is in it.

The five colours are dark enough for white paper, and differ for colour-blind eyes too. Reducers that share a
colour differ in their dashes, and those that share a marker too: so all can be told apart in grey.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

BLACK, RED, BLUE, GREEN, PURPLE = "#000000", "#b82b01", "#0240c8", "#2da58b", "#821a75"
Marker = str | tuple[int, int, int] | tuple[tuple[int, int], ...]
"""As matplotlib names it; or a star: its points, 1, and by how many degrees it is turned; or its corners."""
Dash = str | tuple[int, tuple[float, ...]]
"""As matplotlib has it: a name, or an offset and the lengths of strokes and gaps."""
LONG_DASHED: Dash = (0, (9, 3))
SQUARE_STAR, DIAMOND_STAR, HEXAGRAM = (4, 1, 45), (4, 1, 0), (6, 1, 0)
HOURGLASS = ((-1, -1), (1, -1), (-1, 1), (1, 1), (-1, -1))
BOWTIE = ((-1, -1), (-1, 1), (1, -1), (1, 1), (-1, -1))
COLOURS = (BLACK, RED, BLUE, GREEN, PURPLE)
SOLID, DASHED, DOTTED, DASHDOT = "-", "--", ":", "-."
LONG_DOT: Dash = (0, (9, 2, 1, 2))
DASH_DOTS: Dash = (0, (5, 2, 1, 2, 1, 2))
FILLINGS = ("full", "none", "left", "bottom", "right", "top")
"""Of the markers of several configurations of one reducer, in their order."""


@dataclass(frozen=True)
class Look:
    """A reducer's own colour, marker and dash."""

    colour: str
    marker: Marker
    dash: Dash


LOOKS = {
    "exact": Look(BLACK, "o", SOLID),
    "sage": Look(RED, "^", SOLID),
    "topk": Look(BLUE, "s", DASHED),
    "threshold": Look(GREEN, "D", DASHDOT),
    "global_topk": Look(PURPLE, "P", DASHED),
    "powersgd": Look(PURPLE, "v", SOLID),
    "accordion": Look(BLUE, "X", SOLID),
    "svd": Look(GREEN, "h", DASHED),
    "atomo": Look(RED, "*", DASHED),
    "random_k": Look(BLACK, "<", DOTTED),
    "random_block": Look(BLUE, ">", DOTTED),
    "sign_norm": Look(GREEN, "p", SOLID),
    "signsgd": Look(RED, "d", DASHDOT),
    "signum": Look(BLACK, "8", DASHDOT),
    "gaussian_k": Look(RED, "o", LONG_DOT),
    "redsync": Look(BLUE, "v", LONG_DOT),
    "sidco": Look(GREEN, "s", LONG_DOT),
    "clt_k": Look(PURPLE, "o", DASH_DOTS),
    "micro": Look(BLUE, "^", DASH_DOTS),
    "exdyna": Look(RED, "D", DASH_DOTS),
    "deft": Look(GREEN, "P", DASH_DOTS),
    "onebit": Look(GREEN, SQUARE_STAR, LONG_DASHED),
    "qsgd": Look(BLUE, DIAMOND_STAR, LONG_DASHED),
    "terngrad": Look(RED, HEXAGRAM, LONG_DASHED),
    "natural": Look(PURPLE, HOURGLASS, LONG_DASHED),
    "block_int": Look(BLACK, BOWTIE, LONG_DASHED),
}
SPARE = tuple(
    Look(colour, marker, dash)
    for colour, marker, dash in (
        (BLACK, "H", DASHED),
        (RED, "s", DOTTED),
        (BLUE, "o", DASHDOT),
        (GREEN, "^", DOTTED),
        (PURPLE, "D", DOTTED),
        (PURPLE, "X", DASHDOT),
    )
)
"""The other pairs of a colour and a dash, for reducers that are not in the table."""


def look_of(reducer: str) -> Look:
    """A reducer's look. That of a name which is not in the table follows from the name alone."""
    known = LOOKS.get(reducer)
    return known or SPARE[hashlib.sha256(reducer.encode()).digest()[0] % len(SPARE)]


FILLS = {  # colour and hatch of each phase of a step, which differ in grey too
    "data": ("#eeeeee", "..."),
    "forward": ("#c6dbef", ""),
    "backward": ("#9ecae1", "//"),
    "optimizer": ("#eeeeee", "\\\\"),
    "compression": ("#fdae6b", "xx"),
    "communication": ("#555555", ""),
    "agree": ("#ffffff", "--"),
    "log": ("#ffffff", "oo"),
}


@dataclass(frozen=True)
class Style:
    """How one configuration is drawn: its reducer's look, and what tells it from others with that look."""

    look: Look
    filling: str
    line_width: float


def styles_of(reducers: Sequence[str]) -> list[Style]:
    """A style for each configuration, from the names of their reducers; no two are alike.

    Configurations with one look differ in the filling of their markers, and after six of them also in the
    width of their lines.
    """
    seen: dict[Look, int] = {}
    styles = []
    for look in map(look_of, reducers):
        count = seen[look] = seen.get(look, -1) + 1
        rounds, filling = divmod(count, len(FILLINGS))
        styles.append(Style(look, FILLINGS[filling], 1.5 + rounds))
    return styles
