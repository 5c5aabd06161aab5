"""Every reducer by its name in the configuration, and how one is built."""

from typing import Any

import torch

from reducers.accordion import Accordion
from reducers.atomo import Atomo
from reducers.common import WrapperSettings
from reducers.exact import Exact
from reducers.global_topk import GlobalTopK
from reducers.powersgd import PowerSGD
from reducers.random_k import RandomBlock, RandomK
from reducers.sage import Sage
from reducers.sign_norm import SignNorm
from reducers.signsgd import SignSGD
from reducers.signum import Signum
from reducers.svd import SVD
from reducers.threshold import HardThreshold
from reducers.topk import TopK
from sage.config import Named, Settings, validate
from sage.interfaces import Reducer, Seeds, Slot

REDUCERS: dict[str, type[Reducer]] = {
    "exact": Exact,
    "topk": TopK,
    "global_topk": GlobalTopK,
    "threshold": HardThreshold,
    "sage": Sage,
    "powersgd": PowerSGD,
    "accordion": Accordion,
    "random_k": RandomK,
    "random_block": RandomBlock,
    "sign_norm": SignNorm,
    "signsgd": SignSGD,
    "signum": Signum,
    "svd": SVD,
    "atomo": Atomo,
}
_SETTINGS = {name: reducer.Settings for name, reducer in REDUCERS.items()}


class _Chosen(Settings):
    reducer: Named


def build(config: Named, layout: list[Slot], *, seeds: Seeds, device: torch.device) -> Reducer:
    """The reducer of a configuration's section; of a wrapper the inner reducer first."""
    given: dict[str, Any] = {"seeds": seeds, "device": device}
    if isinstance(config, WrapperSettings):
        given["inner"] = build(_settings(config.inner_section()), layout, **given)
    return REDUCERS[config.name](config, layout, **given)


def _settings(section: dict[str, Any]) -> Named:
    """The settings in a section. Raises ConfigError."""
    return validate({"reducer": section}, _Chosen, {"reducer": _SETTINGS}).reducer


def build_reducer(
    name: str,
    layout: list[Slot],
    *,
    worker: int,
    seed: int = 1,
    device: torch.device | str = "cpu",
    **settings: Any,
) -> Reducer:
    """A reducer for a training loop of your own: settings are those of its section in a configuration.

    seed is equal on all workers, worker is this one's rank; layout is GradientBuffer(model).layout. Raises
    ValueError where there is no such reducer or setting, or a value is out of its range.
    """
    config = _settings({"name": name, **settings})
    return build(config, layout, seeds=Seeds.derive(seed, worker), device=torch.device(device))
