"""Every reducer by its name in the configuration, and how one is built.

Imports neither torch nor a reducer: REDUCERS imports a reducer when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from sage.components import ComponentTable, SettingsTable
from sage.config import Named, Settings, validate

if TYPE_CHECKING:
    import torch

    from sage.interfaces import Reducer, Seeds, Slot

REDUCERS: "ComponentTable[Reducer]" = ComponentTable(
    "sage.interfaces:Reducer",
    {
        "exact": "reducers.exact:Exact",
        "topk": "reducers.topk:TopK",
        "global_topk": "reducers.global_topk:GlobalTopK",
        "threshold": "reducers.threshold:HardThreshold",
        "sage": "reducers.sage:Sage",
        "powersgd": "reducers.powersgd:PowerSGD",
        "accordion": "reducers.accordion:Accordion",
        "random_k": "reducers.random_k:RandomK",
        "random_block": "reducers.random_k:RandomBlock",
        "sign_norm": "reducers.sign_norm:SignNorm",
        "signsgd": "reducers.signsgd:SignSGD",
        "signum": "reducers.signum:Signum",
        "svd": "reducers.svd:SVD",
        "atomo": "reducers.atomo:Atomo",
    },
)
_SETTINGS = SettingsTable(REDUCERS)


class _Chosen(Settings):
    reducer: Named


def build(config: Named, layout: "list[Slot]", *, seeds: "Seeds", device: "torch.device") -> "Reducer":
    """The reducer of a configuration's section; of a wrapper the inner reducer first."""
    from reducers.common import WrapperSettings

    given: dict[str, Any] = {"seeds": seeds, "device": device}
    if isinstance(config, WrapperSettings):
        given["inner"] = build(_settings(config.inner_section()), layout, **given)
    return REDUCERS[config.name](config, layout, **given)


def build_reducer(
    name: str,
    layout: "list[Slot]",
    *,
    worker: int,
    seed: int = 1,
    device: "torch.device | str" = "cpu",
    **settings: Any,
) -> "Reducer":
    """A reducer for a training loop of your own: settings are those of its section in a configuration.

    name is one of REDUCERS, or the place of a class of your own, `package.module:Class`. seed is equal on all
    workers, worker is this one's rank; layout is GradientBuffer(model).layout. Raises ValueError where a name
    or setting is unknown, or a value is out of its range.
    """
    import torch

    from sage.interfaces import Seeds

    config = _settings({"name": name, **settings})
    return build(config, layout, seeds=Seeds.derive(seed, worker), device=torch.device(device))


def _settings(section: dict[str, Any]) -> Named:
    """The settings in a section. Raises ConfigError."""
    return validate({"reducer": section}, _Chosen, {"reducer": _SETTINGS}).reducer
