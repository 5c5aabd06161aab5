"""Runs gathered by configuration: what can be compared, the seeds of a configuration, and its label."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sage.report.runs import Flat, Run

SHORT = 20
"""A longer name does not fit beside a table's numbers in 80 columns: then names are numbered, with a key."""
RECORDING = ("log", "checkpoint", "resume")
"""Sections of a configuration about how a run is recorded, which change none of its results."""


@dataclass(frozen=True)
class Group:
    """One configuration: its finished runs, a seed each, or one unfinished run. name: for where space is
    short."""

    runs: list[Run]
    label: str
    name: str

    @property
    def done(self) -> bool:
        return bool(self.runs[0].summary)

    def values(self, of: Callable[[Run], float | None]) -> list[float]:
        """A number of each run that has one."""
        return [value for value in map(of, self.runs) if value is not None]


@dataclass(frozen=True)
class Section:
    """What can be compared: the groups of one task and world size."""

    place: str
    groups: list[Group]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def score(self) -> str:
        return " or ".join(sorted({run.score for run in self.runs if run.score})) or "score"

    @property
    def is_numbered(self) -> bool:
        return any(group.name != group.label for group in self.groups)


# --- gathering ------------------------------------------------------------------------------------


def gather(runs: Sequence[Run]) -> list[Section]:
    """A section for each task and world size; in it a group for each configuration, exact ones first."""
    sections = []
    for place in dict.fromkeys(run.place for run in runs):
        members = by_configuration([run for run in runs if run.place == place])
        members.sort(key=lambda runs: -exactness(runs[0].config))
        sections.append(Section(place, _named(members)))
    return sections


def by_configuration(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs that differ in the seed alone, together; an unfinished run is by itself.

    Of runs that are alike in the seed too, the first of each seed are together, and so are the second ones.
    """
    groups: dict[tuple[object, ...], list[Run]] = defaultdict(list)
    num_alike: Counter[tuple[str, str]] = Counter()
    for run in runs:
        if run.summary:
            configuration = _as_key({key: value for key, value in run.config.items() if key != "seed"})
            alike = (configuration, _as_key(run.config.get("seed")))
            num_alike[alike] += 1
            groups[configuration, num_alike[alike]].append(run)
        else:
            groups[run.folder,].append(run)
    return list(groups.values())


def _as_key(value: Any) -> str:
    """The same text for equal values."""
    return json.dumps(value, sort_keys=True, default=str)


def _named(members: list[list[Run]]) -> list[Group]:
    labels = label(members)
    fits = max(map(len, labels)) <= SHORT
    reducers = [runs[0].config["reducer.name"] for runs in members]
    names = labels if fits else [f"{i} {reducer}" for i, reducer in enumerate(reducers, 1)]
    return [Group(*parts) for parts in zip(members, labels, names, strict=True)]


# --- labels ---------------------------------------------------------------------------------------


def label(members: Sequence[list[Run]]) -> list[str]:
    """A label for each group, no two alike: the reducer's name, then only what tells apart equal labels.

    The order says what is preferred: the reducer's settings, other settings, seeds, settings of recording,
    and last the names and paths of the folders. An unfinished run is always called so.
    """
    firsts = [runs[0] for runs in members]
    configs = [run.config for run in firsts]
    keys = sorted(set().union(*configs) - {"seed"})
    reducer = [key for key in keys if _section_of(key) == "reducer"]
    recording = [key for key in keys if _section_of(key) in RECORDING]
    others = [key for key in keys if key not in (*reducer, *recording)]

    labels = [config["reducer.name"] for config in configs]
    labels = _tell_apart_by_settings(labels, configs, reducer)
    labels = _tell_apart_by_settings(labels, configs, others)
    labels = [
        text if run.summary else f"{text} (unfinished)" for text, run in zip(labels, firsts, strict=True)
    ]
    labels = _tell_apart(labels, "seed", [_seeds_of(runs) for runs in members])
    labels = _tell_apart_by_settings(labels, configs, recording)
    labels = _tell_apart(labels, "run", [run.folder.name for run in firsts])
    return _tell_apart(labels, "at", [run.folder for run in firsts])


def _tell_apart_by_settings(labels: list[str], configs: Sequence[Flat], keys: Sequence[str]) -> list[str]:
    """The labels, with as many of these settings as it takes."""
    for key in keys:
        name = key.removesuffix(".name").split(".")[-1]
        labels = _tell_apart(labels, name, [config.get(key) for config in configs])
    return labels


def _tell_apart(labels: list[str], name: str, values: Sequence[object]) -> list[str]:
    """The labels, and after those that are equal but have different values: name=value."""
    values_of: dict[str, set[str]] = defaultdict(set)
    for text, value in zip(labels, values, strict=True):
        values_of[text].add(str(value))
    return [
        f"{text} {name}={value}" if len(values_of[text]) > 1 else text
        for text, value in zip(labels, values, strict=True)
    ]


def _section_of(key: str) -> str:
    """reducer.inner.name -> reducer"""
    return key.split(".")[0]


def _seeds_of(runs: Sequence[Run]) -> str:
    return ",".join(str(run.config.get("seed")) for run in runs)


# --- the exact average ----------------------------------------------------------------------------


def exactness(config: Flat) -> int:
    """2 for the plain all-reduce, 1 for one of fewer bits, 0 for a compressor."""
    if config["reducer.name"] != "exact":
        return 0
    return 2 if config.get("reducer.dtype", "float32") == "float32" else 1


def exact_for(group: Group, groups: Sequence[Group]) -> Group | None:
    """The first finished group of the plain all-reduce with the same task's settings and world size."""
    mine = group.runs[0]
    task = {key: value for key, value in mine.config.items() if key.startswith("task.")}
    for other in groups:
        config, place = other.runs[0].config, other.runs[0].place
        is_alike = place == mine.place and task.items() <= config.items()
        if exactness(config) == 2 and other.done and is_alike:
            return other
    return None
