"""The configuration: YAML and overrides into frozen settings; a mistake is one line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError

from reducers import REDUCERS, build_reducer
from run import TABLES
from sage import config
from sage.interfaces import lay_out
from sage.training.settings import RunSettings, check, notes
from tasks import TASKS

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))  # configs/sweeps: see test_sweep.py
CONFIG = """\
epochs: 2
task: {name: digits, batch_per_worker: 32}
reducer: {name: sage, density: 0.2, threshold: 0.5, exchange: union}
feedback: {name: residual}
optimizer: {name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 0.25}
"""
EVERYTHING_CHANGED = """\
seed: 7
world_size: 2
epochs: 3
stop_at_score: 0.5
task: {name: cifar10, model: resnet18, batch_per_worker: 5, memory_format: channels_last}
reducer:
  {name: sage, density: 1e-3, threshold: 1e-7, exchange: union, sampling: by_tensor, terms: alpha}
scaling: {name: error, share: 0.3, lowest: 1e-3, highest: 0.5}
feedback: {name: none}
optimizer: {name: adam, lr: 1e-5, betas: [0.5, 0.75], eps: 1e-9, weight_decay: 1e-4}
schedule: {warmup_epochs: 0.5, reference_batch: 64, decay_epochs: [1.5, 2], decay_factor: 0.3}
clip: {norm: 2.5, before_reduce: false}
precision: bfloat16
deterministic: false
compile: true
accumulate_steps: 3
overlap: {bucket_mb: 2, find_unused_parameters: true}
timeout_seconds: 12.5
on_nonfinite: skip
skip_limit: 4
checkpoint: {every_epochs: null, every_minutes: 2.5, keep: 1, best: true, required: false}
resume: {world_size: reshard}
log: {every: 3, tensorboard: false}
"""
NEEDED = {"scaling.name=schedule": ["scaling.warmup_epochs=2"]}
"""What a component has no default for."""
Load = Callable[..., RunSettings]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(*overrides: str, text: str = CONFIG) -> RunSettings:
        path = tmp_path / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return config.load(path, list(overrides), RunSettings, TABLES)

    return load


def lines_of(load: Load, *overrides: str, text: str = CONFIG) -> list[str]:
    """What a configuration that must be refused is told."""
    with pytest.raises(config.ConfigError) as caught:
        load(*overrides, text=text)
    return str(caught.value).splitlines()


def with_value(path: str, value: Any) -> str:
    """CONFIG with one value changed or added, as a file's text."""
    raw = yaml.safe_load(CONFIG)
    *sections, key = path.split(".")
    inner = raw
    for section in sections:
        inner = inner.setdefault(section, {})
    inner[key] = value
    return yaml.safe_dump(raw)


def parts_of(settings: RunSettings) -> list[config.Settings]:
    """The settings and those inside them."""
    return [settings, *(part for _, part in settings if isinstance(part, config.Settings))]


# --- numbers, files, overrides --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E-3", 0.001),
        ("1.e-3", 0.001),
        (".5e-1", 0.05),
        (".5e0", 0.5),
        ("1.e0", 1.0),
        ("+1e-2", 0.01),
        ("1", 1.0),
    ],
)
def test_a_number_without_a_point_is_a_number_in_file_and_override(
    load: Load, text: str, value: float
) -> None:
    assert load(f"reducer.density={text}").reducer.density == value
    assert load(text=CONFIG.replace("0.2", text)).reducer.density == value


def test_a_quoted_number_is_a_text(load: Load) -> None:
    (line,) = lines_of(load, "optimizer.lr='1e-3'")
    assert line == "optimizer.lr: expected a number in (0, inf), got '1e-3'"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_file_in_configs_loads_and_survives_a_round_trip(load: Load, path: Path) -> None:
    settings = config.load(path, [], RunSettings, TABLES)
    assert load(text=config.to_yaml(settings)) == settings


def test_there_are_files_in_configs() -> None:
    assert {path.stem for path in CONFIGS} >= {"digits", "cifar10_resnet18"}


@pytest.mark.parametrize(
    "override", [f"{section}.name={name}" for section, table in TABLES.items() for name in table]
)
def test_every_component_survives_a_round_trip(load: Load, override: str) -> None:
    section, name = override.split(".name=")
    text = with_value("task", {"name": "digits"})  # no model: each task has its own
    settings = load(override, *NEEDED.get(override, ()), text=text)
    assert type(getattr(settings, section)) is TABLES[section][name]
    assert load(text=config.to_yaml(settings)) == settings


def test_every_value_survives_a_round_trip(load: Load) -> None:
    settings = load(text=EVERYTHING_CHANGED)
    unchanged = {
        name
        for part in parts_of(settings)
        for name, field in type(part).model_fields.items()
        if getattr(part, name) == field.default
    }
    assert unchanged == {"name", "model", "wandb"}  # wandb: needs its package
    assert load(text=config.to_yaml(settings)) == settings


def test_an_override_changes_one_value_and_nothing_else(load: Load) -> None:
    before, after = load(), load("reducer.density=0.3", "log.every=4")
    changed = before.reducer.model_copy(update={"density": 0.3})
    assert after == before.model_copy(
        update={"reducer": changed, "log": before.log.model_copy(update={"every": 4})}
    )


def test_the_last_override_of_a_key_wins(load: Load) -> None:
    assert load("epochs=5", "epochs=6").epochs == 6


def test_another_name_keeps_the_keys_it_knows_and_drops_the_others(load: Load) -> None:
    topk = load("reducer.name=topk").reducer
    assert topk.model_dump() == {"name": "topk", "density": 0.2, "exchange": "union"}
    assert load("reducer.name=exact").reducer.model_dump() == {"name": "exact", "dtype": "float32"}
    adam = load("optimizer.name=adam").optimizer
    assert (adam.lr, adam.weight_decay) == (0.05, 0.25)


def test_the_same_name_drops_nothing(load: Load) -> None:
    assert load("reducer.name=sage") == load()
    (line,) = lines_of(load, "reducer.name=sage", text=with_value("reducer.treshold", 1.0))
    assert line == "reducer.treshold: unknown key; did you mean threshold?"


@pytest.mark.parametrize("order", [1, -1], ids=["name first", "name last"])
def test_a_key_from_the_command_line_is_never_dropped(load: Load, order: int) -> None:
    overrides = ["reducer.name=exact", "reducer.density=0.1"][::order]
    (line,) = lines_of(load, *overrides)
    assert line.startswith("reducer.density: unknown key")
    kept = ["reducer.name=topk", "reducer.density=0.1"][::order]
    assert load(*kept).reducer.density == 0.1


def test_of_two_names_the_last_one_decides_what_the_file_keeps(load: Load) -> None:
    assert load("reducer.name=exact", "reducer.name=topk") == load("reducer.name=topk")


def test_settings_are_frozen(load: Load) -> None:
    settings = load(text=EVERYTHING_CHANGED)
    parts = parts_of(settings)
    assert len(parts) == 12
    for part in parts:
        for name, value in part:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(part, name, value)


def test_the_configuration_imports_no_torch() -> None:
    program = "import sys, sage.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


# --- mistakes -------------------------------------------------------------------------------------

MISTAKES = [  # path, value, what the line says was expected
    ("reducer.density", 0, "a number in (0, 1]"),
    ("reducer.density", 2, "a number in (0, 1]"),
    ("reducer.density", "lots", "a number in (0, 1]"),
    ("reducer.density", True, "a number in (0, 1]"),
    ("reducer.density", None, "a number in (0, 1]"),
    ("reducer.density", [0.1], "a number in (0, 1]"),
    ("reducer.threshold", -1, "a number in [1.2e-38, 3.4e+38] or auto"),
    ("reducer.threshold", "auot", "a number in [1.2e-38, 3.4e+38] or auto"),
    ("reducer.exchange", "gathr", "gather, union"),
    ("optimizer.lr", "nan", "a number in (0, inf)"),
    ("optimizer.lr", float("nan"), "a number in (0, inf)"),
    ("optimizer.lr", float("inf"), "a number in (0, inf)"),
    ("optimizer.lr", -0.1, "a number in (0, inf)"),
    ("optimizer.momentum", 1, "a number in [0, 1)"),
    ("optimizer.nesterov", 1, "true or false"),
    ("task.batch_per_worker", 0, "an integer in [1, inf)"),
    ("task.batch_per_worker", 1.5, "an integer in [1, inf)"),
    ("task.model", "small_cn", "small_cnn"),
    ("epochs", 0, "an integer in [1, inf)"),
    ("seed", -1, "an integer in [0, inf)"),
    ("clip.norm", 0, "a number in (0, inf) or null"),
    ("schedule.reference_batch", 0, "an integer in [1, inf) or null"),
    ("schedule.decay_epochs", 3, "a list, each a number"),
    ("schedule", 3, "a mapping with keys of warmup_epochs"),
    ("precision", "float16", "float32, tf32, bfloat16"),
    ("compile", 1, "true or false"),
    ("task.memory_format", "channels_first", "contiguous, channels_last"),
    ("optimizer", "sgd", "a mapping with a name, one of sgd, adam"),
    ("reducer.name", "sagee", "did you mean sage?"),
    ("reducer.name", 1, "one of exact, topk, global_topk, threshold, sage"),
    ("task.name", "cifar", "did you mean cifar10?"),
    ("feedback.name", "residuals", "did you mean residual?"),
]


@pytest.mark.parametrize(("path", "value", "expected"), MISTAKES)
def test_a_bad_value_is_one_line_with_path_value_and_what_was_expected(
    load: Load, path: str, value: Any, expected: str
) -> None:
    shown = yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...")
    (line,) = lines_of(load, f"{path}={shown}")
    assert line.startswith(f"{path}: ")
    assert expected in line
    assert f"got {value!r}" in line if isinstance(value, str) else f"got {shown}" in line
    assert lines_of(load, text=with_value(path, value)) == [line]


@pytest.mark.parametrize(
    ("path", "nearest"),
    [
        ("reducer.densty", "density"),
        ("optimizer.nestrov", "nesterov"),
        ("schedule.warmup_epoch", "warmup_epochs"),
        ("log.evry", "every"),
        ("precison", "precision"),
    ],
)
def test_an_unknown_key_is_one_line_with_the_nearest_name(load: Load, path: str, nearest: str) -> None:
    line = f"{path}: unknown key; did you mean {nearest}?"
    assert lines_of(load, f"{path}=1") == [line]
    assert lines_of(load, text=with_value(path, 1)) == [line]


def test_an_unknown_key_like_no_other_is_told_the_keys_there_are(load: Load) -> None:
    (line,) = lines_of(load, "feedback.zzz=1")
    assert line == "feedback.zzz: unknown key; expected one of name, decay, lr_correction"


@pytest.mark.parametrize("key", ["epochs", "reducer", "lr"])
def test_a_required_key_that_is_misspelt_is_one_line(load: Load, key: str) -> None:
    (line,) = lines_of(load, text=CONFIG.replace(f"{key}:", f"{key}s:"))
    assert f"{key}s: unknown key; did you mean {key}?" in line


@pytest.mark.parametrize("section", ["task", "reducer", "feedback", "optimizer", "epochs"])
def test_a_missing_key_is_one_line(load: Load, section: str) -> None:
    raw = yaml.safe_load(CONFIG)
    del raw[section]
    (line,) = lines_of(load, text=yaml.safe_dump(raw))
    assert line.startswith(f"{section}: missing; expected ")


def test_nesterov_without_momentum_is_one_line(load: Load) -> None:
    (line,) = lines_of(load, "optimizer.nesterov=true", "optimizer.momentum=0")
    assert line == "optimizer: nesterov needs a momentum in (0, 1), got momentum 0"


def test_several_mistakes_are_a_line_each(load: Load) -> None:
    lines = lines_of(load, "reducer.density=0", "optimizer.lr=nan", "task.name=cat", "epochs=0", "sed=1")
    paths = {line.partition(":")[0] for line in lines}
    assert len(lines) == 5
    assert paths == {"reducer.density", "optimizer.lr", "task.name", "epochs", "sed"}


@pytest.mark.parametrize("override", ["epochs", "=3", "reducer..density=1", ".epochs=1"])
def test_an_override_without_a_path_and_a_value_is_one_line(load: Load, override: str) -> None:
    assert lines_of(load, override) == [f"{override}: expected an override of the form key.path=value"]


def test_an_override_inside_a_value_is_one_line(load: Load) -> None:
    assert lines_of(load, "epochs.more=3") == ["epochs.more: epochs is 2, not a mapping"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "expected a mapping of keys to values, got null"),
        ("[1, 2]", "expected a mapping of keys to values, got [1, 2]"),
        ("just words", "expected a mapping of keys to values, got 'just words'"),
        ("epochs: 2\ntask: {name: digits", "not valid YAML (line 2)"),
        ("a: 1\n---\nb: 2\n", "not valid YAML (line 2)"),
        ("a: !!python/object:os.system x", "not valid YAML (line 1)"),
        ("a: \x00", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_mapping_or_no_yaml_is_one_line(load: Load, text: str, told: str) -> None:
    (line,) = lines_of(load, text=text)
    path, _, rest = line.partition("config.yaml: ")
    assert Path(path).is_dir()
    assert rest.startswith(told)


def test_an_override_that_is_no_yaml_is_one_line(load: Load) -> None:
    (line,) = lines_of(load, "reducer.density=[")
    assert line.startswith("reducer.density=[: not valid YAML")


def test_a_key_that_stands_twice_is_one_line_with_its_place(load: Load) -> None:
    (line,) = lines_of(load, text=CONFIG + "epochs: 3\n")
    assert "the key epochs is given twice" in line
    assert f"line {len(CONFIG.splitlines()) + 1}" in line


def test_a_value_that_yaml_cannot_build_is_one_line_with_its_path(load: Load) -> None:
    (line,) = lines_of(load, "seed=!!timestamp 2024-13-45")
    assert line.startswith("seed=!!timestamp 2024-13-45: not valid YAML: ")


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\x80\x81")
    reasons = {"missing": "No such file or directory", ".": "Is a directory", "binary": "not a text file"}
    for name, reason in reasons.items():
        path = tmp_path / name
        with pytest.raises(config.ConfigError) as caught:
            config.load(path, [], RunSettings, TABLES)
        assert str(caught.value) == f"{path}: cannot be read: {reason}"


# --- values that are numbers and make no sense ----------------------------------------------------


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("schedule.decay_epochs=[3,2]", "expected positive epochs in ascending order, got [3.0, 2.0]"),
        ("schedule.decay_epochs=[2,2]", "expected positive epochs in ascending order, got [2.0, 2.0]"),
        ("schedule.decay_epochs=[0,2]", "expected positive epochs in ascending order, got [0.0, 2.0]"),
        ("optimizer.lr=0", "optimizer.lr: expected a number in (0, inf), got 0"),
        ("seed=1:30", "seed: expected an integer in [0, inf), got '1:30'"),
        ("seed=yes", "seed: expected an integer in [0, inf), got 'yes'"),
    ],
)
def test_a_value_without_sense_is_refused_in_one_line(load: Load, override: str, line: str) -> None:
    (found,) = lines_of(load, override)
    assert line in found
    assert found.startswith(override.split("=")[0])


@pytest.mark.parametrize(("text", "seed"), [("010", 10), ("08", 8), ("0o17", 15)])
def test_a_number_is_that_of_yaml_1_2_in_file_and_override(load: Load, text: str, seed: int) -> None:
    assert load(f"seed={text}").seed == seed
    assert load(text=f"{CONFIG}\nseed: {text}\n").seed == seed


def test_decays_beyond_the_last_epoch_are_allowed_and_said(load: Load) -> None:
    settings = load("epochs=3", "schedule.decay_epochs=[1, 3, 7.5]")
    assert notes(settings, torch.device("cpu")) == [
        "schedule.decay_epochs: 3 has no effect, since training ends with epoch 3",
        "schedule.decay_epochs: 7.5 has no effect, since training ends with epoch 3",
    ]


@pytest.mark.parametrize(
    ("task", "target", "message"),
    [
        ("digits", 95, r"stop_at_score: expected a number in \[0, 1\], as accuracy is, got 95"),
        ("synthetic_ratings", 1.5, r"in \[0, 1\], as hr@10 is, got 1\.5"),
        ("python_docs", 0.5, r"in \[1, inf\], as perplexity is, got 0\.5"),
    ],
)
def test_a_target_that_no_score_reaches_is_refused(task: str, target: float, message: str) -> None:
    settings = config.load(ROOT / f"configs/{task}.yaml", [f"stop_at_score={target}"], RunSettings, TABLES)
    with pytest.raises(ValueError, match=message):
        check(settings, TASKS, REDUCERS, ROOT / "data", 1)


@pytest.mark.parametrize("reducer", ["powersgd", "svd", "atomo"])
def test_a_rank_that_compresses_no_matrix_is_said(reducer: str) -> None:
    layout = lay_out([("weight", (8, 6)), ("bias", (8,))])
    built = [build_reducer(reducer, layout, worker=0, rank=rank) for rank in (1, 64)]
    assert built[0].notes() == []
    line = "reducer.rank: 64 makes no matrix of this model smaller, so everything is sent whole"
    assert built[1].notes() == [line]
