"""Gathers runs: by workload into sections, in a section by configuration into groups, which get labels."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sage.report.runs import Flat, Run

LONGEST_LABEL = 20
"""A longer label does not fit beside a table's numbers in 80 columns: then all groups are numbered."""
RECORDING = ("log", "checkpoint", "resume")
"""Sections of a configuration that say how a run is recorded; they change none of its results."""
Measure = Callable[[Run], float | None]
"""A number of a run; None where it has none."""


@dataclass(frozen=True)
class Group:
    """The runs of one configuration: finished ones that differ in the seed, or one unfinished run."""

    runs: list[Run]
    label: str
    """The reducer, and what tells this group from the others of its section."""
    number: int | None
    """Its number in the section, where labels are too long for a table; else None."""

    @property
    def reducer(self) -> str:
        return str(self.runs[0].config["reducer.name"])

    @property
    def short_label(self) -> str:
        """What a table and a bar say: the label, or the number and the reducer."""
        return self.label if self.number is None else f"{self.number} {self.reducer}"

    @property
    def done(self) -> bool:
        return bool(self.runs[0].summary)

    def values(self, measure: Measure) -> list[float]:
        """The numbers of those runs that have one."""
        return [value for value in map(measure, self.runs) if value is not None]


@dataclass(frozen=True)
class Section:
    """The groups of one workload: what can be compared."""

    workload: str
    groups: list[Group]

    @property
    def runs(self) -> list[Run]:
        return [run for group in self.groups for run in group.runs]

    @property
    def score(self) -> str:
        """The score's name."""
        return " or ".join(sorted({run.score for run in self.runs if run.score})) or "score"

    @property
    def is_numbered(self) -> bool:
        return any(group.number is not None for group in self.groups)


# --- gathering ------------------------------------------------------------------------------------


def gather(runs: Sequence[Run]) -> list[Section]:
    """Make a section of each workload, and in it a group of each configuration, exact ones first."""
    sections = []
    for workload in dict.fromkeys(run.workload for run in runs):
        members = by_configuration([run for run in runs if run.workload == workload])
        members.sort(key=lambda runs: -exactness(runs[0].config))
        sections.append(Section(workload, _labelled(members)))
    return sections


def by_configuration(runs: Sequence[Run]) -> list[list[Run]]:
    """Put together the finished runs that differ in the seed alone; an unfinished run stays alone.

    Where a seed was run several times, the first runs of each seed are one group, the second runs another.
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


def _labelled(members: list[list[Run]]) -> list[Group]:
    labels = make_labels(members)
    is_numbered = max(map(len, labels)) > LONGEST_LABEL
    return [
        Group(runs, label, number if is_numbered else None)
        for number, (runs, label) in enumerate(zip(members, labels, strict=True), 1)
    ]


# --- labels ---------------------------------------------------------------------------------------


def make_labels(members: Sequence[list[Run]]) -> list[str]:
    """Make a label for each group, no two alike: the reducer's name, and as little as tells groups apart.

    What comes first is preferred: the reducer's settings, other settings, the seeds, how the runs were
    recorded, and last the folders' names and paths. The label of an unfinished run says so in any case.
    """
    firsts = [runs[0] for runs in members]
    configs = [run.config for run in firsts]
    keys = sorted(set().union(*configs) - {"seed"})
    reducer = [key for key in keys if _section_of(key) == "reducer"]
    recording = [key for key in keys if _section_of(key) in RECORDING]
    others = [key for key in keys if key not in (*reducer, *recording)]

    labels = [config["reducer.name"] + " overlap" * is_overlapped(config) for config in configs]
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
    """Add those settings to the labels that tell equal ones apart."""
    for key in keys:
        name = key.removesuffix(".name").split(".")[-1]
        labels = _tell_apart(labels, name, [config.get(key) for config in configs])
    return labels


def _tell_apart(labels: list[str], name: str, values: Sequence[object]) -> list[str]:
    """Add name=value to labels that are equal where their values differ."""
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


# --- what a group is compared with ----------------------------------------------------------------


def is_overlapped(config: Flat) -> bool:
    """Whether gradients were exchanged while backward computed the next ones."""
    return "overlap.bucket_mb" in config


def exactness(config: Flat) -> int:
    """How exact the average is: 3 for a plain all-reduce that overlaps with backward, 2 for one that does
    not, 1 for one of fewer bits, 0 for a compressor."""
    if config["reducer.name"] != "exact":
        return 0
    if config.get("reducer.dtype", "float32") != "float32":
        return 1
    return 3 if is_overlapped(config) else 2


def find_exact(group: Group, groups: Sequence[Group]) -> Group | None:
    """Find the first finished plain all-reduce on the same task's settings and with as many workers: one that
    overlaps with backward where there is one."""
    return _find_alike(group, groups, lambda other: exactness(other.runs[0].config) >= 2)


def find_baseline(group: Group, groups: Sequence[Group], name: str | None) -> Group | None:
    """Find the first finished group of a name or a reducer's name, on the same task's settings and with as
    many workers; without a name, the plain all-reduce."""
    if name is None:
        return find_exact(group, groups)
    named = _find_alike(group, groups, lambda other: name in (other.label, other.short_label))
    return named or _find_alike(group, groups, lambda other: other.reducer == name)


def _find_alike(group: Group, groups: Sequence[Group], is_wanted: Callable[[Group], bool]) -> Group | None:
    mine = group.runs[0]
    task = {key: value for key, value in mine.config.items() if key.startswith("task.")}
    for other in groups:
        theirs = other.runs[0]
        is_alike = theirs.workload == mine.workload and task.items() <= theirs.config.items()
        if other.done and is_wanted(other) and is_alike:
            return other
    return None
