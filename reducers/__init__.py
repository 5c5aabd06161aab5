"""Every reducer by its name in the configuration, and how one is built.

Imports neither torch nor a reducer: REDUCERS imports a reducer when it is asked for.
"""

from typing import TYPE_CHECKING, Any

from sage.components import ComponentTable, SettingsTable
from sage.config import Named, Settings, validate

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn.parallel import DistributedDataParallel

    from sage.exchange.attached import AttachedExchange
    from sage.exchange.ddp_hook import Build, DDPHook
    from sage.exchange.exchange import Exchange
    from sage.exchange.fsdp_hook import DeviceMesh, FSDPHook
    from sage.exchange.scaling import Scaling
    from sage.interfaces import Communicator, Reducer, Seeds, Slot

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
        "block_int": "reducers.block_int:BlockInt",
        "onebit": "reducers.onebit:OneBit",
        "qsgd": "reducers.qsgd:QSGD",
        "terngrad": "reducers.terngrad:TernGrad",
        "natural": "reducers.natural:Natural",
        "svd": "reducers.svd:SVD",
        "atomo": "reducers.atomo:Atomo",
        "gaussian_k": "reducers.gaussian_k:GaussianK",
        "redsync": "reducers.redsync:RedSync",
        "sidco": "reducers.sidco:Sidco",
        "clt_k": "reducers.clt_k:CltK",
        "micro": "reducers.micro:Micro",
        "exdyna": "reducers.exdyna:ExDyna",
        "deft": "reducers.deft:Deft",
    },
)
_SETTINGS = SettingsTable(REDUCERS)


class _Chosen(Settings):
    reducer: Named


class _ChosenFeedback(Settings):
    feedback: Named


class _ChosenScaling(Settings):
    scaling: Named


class _OwnOptimizer(Named):
    """Somebody's own, of which nothing is known: that it has no momentum beside the feedback's is theirs."""

    name: str = "own"
    momentum: float = 0.0


def build(config: Named, layout: "list[Slot]", *, seeds: "Seeds", device: "torch.device") -> "Reducer":
    """The reducer of a configuration's section; of a wrapper the inner reducer first."""
    from reducers.common import WrapperSettings

    given: dict[str, Any] = {"seeds": seeds, "device": device}
    if isinstance(config, WrapperSettings):
        given["inner"] = build(_settings(config.inner_section()), layout, **given)
    return REDUCERS[config.name](config, layout, **given)


def build_scaling(
    config: Named, reducer: "Reducer", layout: "list[Slot]", device: "torch.device"
) -> "Scaling":
    """The scaling of a configuration's section, of this reducer."""
    from sage.exchange.scaling import SCALINGS
    from sage.interfaces import Seeds

    def build_dense(dtype: str) -> "Reducer":
        exact = _settings({"name": "exact", "dtype": dtype})
        return build(exact, layout, seeds=Seeds(0, 0), device=device)  # it draws nothing

    return SCALINGS[config.name](config, reducer, build_dense, device=device)


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


def attach(
    model: "nn.Module",
    name: str,
    *,
    feedback: str | dict[str, Any] | None = None,
    scaling: str | dict[str, Any] = "constant",
    seed: int = 1,
    steps_per_epoch: int | None = None,
    comm: "Communicator | None" = None,
    **settings: Any,
) -> "AttachedExchange":
    """A reducer in a training loop of your own: call .step() between backward and the optimizer.

        exchange = reducers.attach(model, "sage", density=0.001)

    name and settings: a reducer's, as in a configuration. feedback: none, residual or momentum (then the
    optimizer has none), or such a section of a configuration; None is residual, or none for a reducer that
    leaves no error, as exact does. scaling: what the density is in each step, a rule's name or such a
    section: {"name": "time", "share": 0.2}. steps_per_epoch: for schedules that follow the epoch. comm: which
    workers; None is the default process group where there is one, else this process alone. Every worker gets
    rank 0's weights. Raises ValueError where a value or the model cannot be served.
    """
    from sage.exchange.attached import AttachedExchange

    def build_one(layout: "list[Slot]", like: "Tensor", comm: "Communicator") -> "Exchange":
        given: dict[str, Any] = {"feedback": feedback, "scaling": scaling, **settings}
        return build_exchange(name, layout, like, comm, seed=seed, **given)

    return AttachedExchange(model, build_one, comm, steps_per_epoch)


def hook(
    ddp: "DistributedDataParallel",
    name: str,
    *,
    feedback: str | dict[str, Any] | None = None,
    scaling: str | dict[str, Any] = "constant",
    seed: int = 1,
    steps_per_epoch: int | None = None,
    overlap: bool = True,
    scaler: "torch.amp.GradScaler | None" = None,
    **settings: Any,
) -> "DDPHook":
    """A reducer in place of DistributedDataParallel's all-reduce; it registers itself.

        hook = reducers.hook(ddp, "powersgd", rank=4)

    Call it before the first backward. overlap: exchange while backward goes on. scaler: the loop's
    GradScaler, where it has one. The rest is as for attach, but each bucket of DDP has its own exchange: its
    density is scaled by itself, and not by time, as no share of the step is its alone.
    """
    from sage.exchange.ddp_hook import DDPHook

    build_one = _bucket_builder(name, seed, feedback, scaling, settings)
    return DDPHook(ddp, build_one, overlap=overlap, scaler=scaler, steps_per_epoch=steps_per_epoch)


def hook_fsdp(
    model: "nn.Module",
    name: str,
    *,
    replicas: "DeviceMesh | None" = None,
    feedback: str | dict[str, Any] | None = None,
    scaling: str | dict[str, Any] = "constant",
    seed: int = 1,
    steps_per_epoch: int | None = None,
    scaler: "torch.amp.GradScaler | None" = None,
    **settings: Any,
) -> "FSDPHook":
    """A reducer between the replicas of an FSDP2 model (hybrid sharding); it registers itself.

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        hook = reducers.hook_fsdp(model, "topk", replicas=mesh["replicate"], density=0.01)

    Call it before the first forward pass. replicas: the processes that hold the same shard. The rest is as
    for hook, but each module given to fully_shard has its own exchange, and each process its own shard's.
    """
    from sage.exchange.fsdp_hook import FSDPHook

    build_one = _bucket_builder(name, seed, feedback, scaling, settings)
    return FSDPHook(model, build_one, replicas, scaler=scaler, steps_per_epoch=steps_per_epoch)


def _bucket_builder(
    name: str,
    seed: int,
    feedback: str | dict[str, Any] | None,
    scaling: str | dict[str, Any],
    settings: dict[str, Any],
) -> "Build":
    """Makes the exchange of a bucket. Raises ValueError where the density cannot be scaled by buckets."""
    from sage.exchange.scaling import SCALINGS
    from sage.interfaces import seed_of

    if not SCALINGS[(chosen := _scaling_settings(scaling)).name].serves_buckets:
        expected = "expected another for a hook, whose buckets overlap with backward (attach takes it)"
        raise ValueError(f"scaling.name: {expected}, got {chosen.name}")

    def build_one(layout: "list[Slot]", like: "Tensor", comm: "Communicator") -> "Exchange":
        own_seed = seed_of(seed, *(slot.name for slot in layout))  # two buckets draw differently
        given: dict[str, Any] = {"feedback": feedback, "scaling": scaling, **settings}
        return build_exchange(name, layout, like, comm, seed=own_seed, **given)

    return build_one


def build_exchange(
    name: str,
    layout: "list[Slot]",
    like: "Tensor",
    comm: "Communicator",
    *,
    feedback: str | dict[str, Any] | None = None,
    scaling: str | dict[str, Any] = "constant",
    seed: int = 1,
    **settings: Any,
) -> "Exchange":
    """An Exchange of a reducer and its error feedback, which attach and hook describe.

    like (n,): a tensor of the flat gradient's type and device. Raises ValueError.
    """
    from sage.exchange.exchange import Exchange
    from sage.exchange.feedback import FEEDBACKS
    from sage.exchange.scaling import SCALINGS
    from sage.interfaces import Seeds

    config = _settings({"name": name, **settings})
    kind = REDUCERS[config.name]
    reducer = build(config, layout, seeds=Seeds.derive(seed, comm.rank), device=like.device)
    if feedback is None:
        feedback = "residual" if kind.takes_feedback and not reducer.leaves_nothing else "none"
    section = {"name": feedback} if isinstance(feedback, str) else feedback
    table = {key: value.Settings for key, value in FEEDBACKS.items()}
    kept = validate({"feedback": section}, _ChosenFeedback, {"feedback": table}).feedback
    FEEDBACKS[kept.name].check(kind, config, _OwnOptimizer())
    scales = _scaling_settings(scaling)
    SCALINGS[scales.name].check(scales, kind, config, simulated=False)
    rule = build_scaling(scales, reducer, layout, like.device)
    return Exchange(FEEDBACKS[kept.name](kept, like), reducer, comm, layout, scaling=rule)


def _scaling_settings(scaling: str | dict[str, Any]) -> Named:
    """The settings of a scaling's name or section. Raises ConfigError."""
    from sage.exchange.scaling import SCALINGS

    section = {"name": scaling} if isinstance(scaling, str) else scaling
    return validate({"scaling": section}, _ChosenScaling, {"scaling": SettingsTable(SCALINGS)}).scaling


def _settings(section: dict[str, Any]) -> Named:
    """The settings in a section. Raises ConfigError."""
    return validate({"reducer": section}, _Chosen, {"reducer": _SETTINGS}).reducer
