"""What the benchmarks measure with: made data of the official sizes, and the reading of a run's lines."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.made import PLACES, draw_ratings, find_or_make
from benchmarks.published import CONFIGS, Seconds, published_configs, seconds_of, step_lines, task_of
from tasks.data.leave_one_out import split
from tasks.data.movielens import ML_100K
from tasks.data.ptb import PTB


def test_the_published_configurations_are_those_with_published_data_and_without_small_ones() -> None:
    names = set(published_configs())
    others = {file.stem for file in CONFIGS.glob("*.yaml")} - names
    assert {name for name in others if task_of(name) in PLACES} == {
        name for name in others if name.endswith("_small")
    }
    families = (
        "cifar10_resnet18",
        "cifar100_senet18",
        "wikitext2_lstm",
        "ptb_lstm",
        "ncf_ml-1m",
        "ncf_ml-20m",
    )
    assert names >= set(families)


@pytest.mark.parametrize(("num_users", "num_items"), [(943, 1_682), (60, 1_000)])
def test_the_split_drops_no_made_user_and_no_made_item(num_users: int, num_items: int) -> None:
    ratings = draw_ratings(60 * num_users, num_users, num_items)
    assert len(ratings.users) == 60 * num_users
    assert np.array_equal(ratings.users, np.sort(ratings.users))
    found = split(ratings)
    assert (found.num_users, found.num_items) == (num_users, num_items)


def test_data_is_made_once_and_only_where_there_is_none(tmp_path: Path) -> None:
    data, temporary = tmp_path / "data", tmp_path / "temporary"
    assert find_or_make("ml-100k", data, temporary) == (temporary, "made")
    file = ML_100K.path(temporary)
    ML_100K.check(temporary)
    before = file.stat().st_mtime_ns
    assert find_or_make("ml-100k", data, temporary) == (temporary, "made")
    assert file.stat().st_mtime_ns == before
    assert find_or_make("ml-100k", temporary, data) == (temporary, "real")
    assert not data.exists()


def test_a_made_text_has_the_published_sizes_in_the_prepared_form(tmp_path: Path) -> None:
    find_or_make("ptb", tmp_path / "data", tmp_path)
    text = PTB.read(tmp_path, "spacy")
    assert [len(part) for part in (text.train, text.valid, text.test)] == [929_589, 73_760, 82_430]
    assert len(text.vocabulary) == 10_000


def test_a_runs_step_lines_are_read_without_the_one_being_written(tmp_path: Path) -> None:
    assert step_lines(tmp_path) == []
    (tmp_path / "run").mkdir()
    lines = [{"kind": "step", "step": 0}, {"kind": "epoch", "step": 1}, {"kind": "step", "step": 1}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "run" / "metrics.jsonl").write_text(text + '{"kind": "st')
    assert step_lines(tmp_path) == [lines[0], lines[2]]


def test_a_steps_seconds_are_its_phases_with_communicate_inside_reduce() -> None:
    phases = [
        {"data": 1.0, "forward": 2.0, "backward": 4.0, "reduce": 8.0, "communicate": 5.0, "optimizer": 16.0},
        {"data": 0.0, "forward": 1.0, "backward": 1.0, "reduce": 1.0, "optimizer": 1.0, "evaluate": 99.0},
        {"data": 0.0, "forward": 3.0, "backward": 3.0, "reduce": 3.0, "communicate": 2.0, "optimizer": 1.0},
    ]
    lines = [{"seconds": seconds} for seconds in phases]
    assert seconds_of(lines, "communicate") == Seconds(median=2.0, fastest=0.0, slowest=5.0)
    assert seconds_of(lines, "step") == Seconds(median=10.0, fastest=4.0, slowest=31.0)
