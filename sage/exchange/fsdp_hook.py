"""Any reducer between the replicas of an FSDP2 model (hybrid sharding): an Exchange for each sharded module.

Inside a shard group FSDP itself averages the gradients, in full precision. What it leaves with a process, the
mean gradient of its own shard, is then exchanged with the processes that hold the same shard in the other
groups. So gradient, memory and what the reducer keeps are a shard's: n / shards elements.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule

from sage.exchange.absent import naming_absent
from sage.exchange.attached import copy_from_first, local_part
from sage.exchange.bucket import BucketGradient, BucketHook, Part, Step, merge
from sage.exchange.comm import DistComm, comm_of
from sage.exchange.echo import Build
from sage.exchange.exchange import State
from sage.interfaces import lay_out

SINCE = "2.7"
"""The first torch in which FSDPModule has set_all_reduce_hook (pytorch pull request 147114)."""
HOW = "fully_shard(..., mesh=mesh['shard']) and replicas=mesh['replicate']"
"""How a model is given to FSDP and to the hook."""


@dataclass
class ShardedModule:
    """What one call of fully_shard has made: FSDP reduces its gradients together."""

    module: FSDPModule
    parameters: list[tuple[str, Any]]
    """Name and torch's FSDPParam, in the order of the flat gradient."""
    dtype: torch.dtype
    """Of the flat gradient."""
    mesh_info: Any
    fills_in_unused: bool
    """Whether FSDP gives parameters without a gradient one of zeros."""

    def trained(self) -> list[tuple[str, tuple[int, ...]]]:
        """Name and a shard's shape of the parameters that have gradients now."""
        return [
            (name, tuple(one.padded_sharded_param_size))
            for name, one in self.parameters
            if one.sharded_param.requires_grad
        ]


class FSDPHook(BucketHook):
    """Exchanges the shards' gradients of a fully_shard model between replicas of it.

        mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh["shard"])
        hook = reducers.hook_fsdp(model, "topk", replicas=mesh["replicate"])

    After backward() every gradient is the estimate of the mean over all processes. Where some gradient was
    not finite is_usable is False on all of them, all gradients are NaN, and memory and reducers are as they
    were; for this a copy of the state is kept: as much memory again. FSDP waits for each exchange: nothing
    but what a GPU was given before goes on meanwhile.

    Each module given to fully_shard is an exchange of its own: a method that compares elements of the whole
    gradient compares those of a module's shard. FSDP fills shards up with zeros to equal sizes, and a state
    has these sizes too.
    """

    def __init__(
        self,
        model: nn.Module,
        build: Build,
        replicas: DeviceMesh | None,
        *,
        scaler: torch.amp.GradScaler | None = None,
        steps_per_epoch: int | None = None,
    ) -> None:
        """Register with FSDP, before the first forward pass; give all replicas the first one's weights.

        replicas: the processes that hold the same shard as this one. scaler: the GradScaler of the loop, so
        that the memory is kept in unscaled units. Raises ValueError where something cannot be served.
        """
        sharded = _find_sharded(model)
        mesh, shards = _check_replicas(replicas), _shard_group(sharded)
        _check_all_sharded(model, sharded)
        device = torch.device(mesh.device_type)
        comm = comm_of(mesh.get_group(), device)
        super().__init__(comm, scaler=scaler, steps_per_epoch=steps_per_epoch)
        self._model, self._shards = model, comm_of(shards, device)
        self._task = -1  # autograd's number of the backward of _step
        self._check_same_shard(sharded, device)
        copy_from_first(model, self.comm.another())
        trained = [one for one in sharded if one.trained()]
        for dtype in {one.dtype for one in trained}:
            layout = lay_out(pair for one in trained if one.dtype == dtype for pair in one.trained())
            self._warm_up(build, layout, torch.empty(0, dtype=dtype, device=device))
        for one in trained:
            part = self._make_part(one, build, device)
            self._parts[part.names] = part
            one.module.set_all_reduce_hook(partial(self._take, one, part))

    def _check_same_shard(self, sharded: list[ShardedModule], device: torch.device) -> None:
        """Raise ValueError, on all of them, where the processes hold different shards."""
        sizes = [prod(shape) for one in sharded for _, shape in one.trained()]
        mine = torch.tensor([self._shards.rank, sum(sizes)], device=device)
        held = self.comm.read(self.comm.another().all_gather(mine))  # (replicas, 2)
        if (held != held[0]).any():
            raise ValueError(
                f"replicas: expected processes that hold the same shard ({HOW}), got shards "
                f"{held[:, 0].tolist()} of {held[:, 1].tolist()} elements"
            )

    def _make_part(self, sharded: ShardedModule, build: Build, device: torch.device) -> Part:
        layout = lay_out(sharded.trained())
        buffer = torch.zeros(layout[-1].stop, dtype=sharded.dtype, device=device)
        gradient = BucketGradient(layout, buffer, sharded.fills_in_unused)
        gradient.hold(buffer)
        exchange = build(layout, gradient.flat, self.comm)
        return Part(tuple(slot.name for slot in layout), gradient, exchange)

    # --- what a loop calls ----------------------------------------------------------------------------

    def state_dict(self) -> State:
        """All that the next step depends on, by parameter name and by module; each process's is its own, and
        that of its shards."""
        return {"step": self.steps.step, **merge(self._parts.values())}

    def load_state_dict(self, state: State) -> None:
        """Take the state_dict of the same shard. Raises ValueError where a parameter is missing, or its
        shape or type is another."""
        for exchange in self.exchanges:
            exchange.load_state_dict(state)
        self.steps.step = state["step"]

    # --- what FSDP calls ------------------------------------------------------------------------------

    @torch.no_grad()
    def _take(self, sharded: ShardedModule, part: Part, buffer: Tensor) -> None:
        """Exchange a module's gradients (n,), in place; the first one of a backward asks for its end."""
        if self._error is not None:
            raise self._error
        task = torch._C._current_graph_task_id()
        if self._step is None or task != self._task:  # a backward that has failed has no end
            self._step, self._task = Step(self.steps.progress()), task
            Variable._execution_engine.queue_callback(partial(self._end, self._step, buffer.device))
        with self._keeping_error(self.comm):
            _check_gradient(sharded, part, buffer)
            if self._step.is_usable:  # else no later module's gradients are exchanged
                part.gradient.hold(buffer)
                self._step.exchange(part, self._scaler, keeps=True)

    @torch.no_grad()
    def _end(self, step: Step, device: torch.device) -> None:
        """After backward: agree with the other shards, which have seen other gradients, whether the step can
        be used; put back what was moved where it cannot."""
        self._step = None
        for part in self._parts.values():
            part.gradient.hold(torch.empty(0, device=device))  # let go of FSDP's memory
        flag = torch.tensor([not step.is_usable], dtype=torch.int32, device=device)
        with self._keeping_error(self._shards):
            self._shards.all_reduce(flag, "max")
            self.is_usable = not self._shards.read(flag).item()
        if not self.is_usable:
            step.put_back()
            self._spoil_gradients()
        self.steps.step += 1

    @contextmanager
    def _keeping_error(self, comm: DistComm) -> Iterator[None]:
        """An error ends the hook, too: what the others have moved meanwhile is not known. comm: with whom it
        communicates in here."""
        try:
            with naming_absent(comm, self.steps.step):
                yield
        except BaseException as error:
            self._error = error
            raise

    def _spoil_gradients(self) -> None:
        """Make all gradients NaN."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # FSDP may still be writing them, on a stream of its own
        for parameter in self._model.parameters():
            if parameter.grad is not None:
                local_part(parameter.grad).fill_(torch.nan)


def _check_gradient(sharded: ShardedModule, part: Part, buffer: Tensor) -> None:
    """Raise ValueError where FSDP's flat gradient is not that of the parameters which the hook was made
    for."""
    n = part.exchange.layout[-1].stop
    if tuple(name for name, _ in sharded.trained()) != part.names:
        raise ValueError(f"module of {part.names[0]}: expected the parameters that were trained at first")
    if buffer.numel() != n or buffer.dtype != sharded.dtype:
        raise ValueError(
            f"module of {part.names[0]}: expected gradients of all its {len(part.names)} parameters, {n} "
            f"elements a shard ({sharded.dtype}), got {buffer.numel()} ({buffer.dtype}): where a step leaves "
            "some unused, call model.set_reduce_scatter_unused_params(True) before the hook is made"
        )


def _find_sharded(model: nn.Module) -> list[ShardedModule]:
    """What fully_shard has made of a model. Raises ValueError where it is not FSDP2's, or torch is too
    old."""
    if not isinstance(model, FSDPModule):
        raise ValueError(f"expected a model that was given to fully_shard, got {type(model).__name__}")
    if not hasattr(FSDPModule, "set_all_reduce_hook"):
        raise ValueError(f"a hook of FSDP2 needs torch {SINCE} or newer, got {torch.__version__}")
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[int, ShardedModule] = {}  # several modules may share a group
    for module in model.modules():
        if isinstance(module, FSDPModule):
            for group in _groups_of(module):
                first, policy = group.fsdp_params[0].sharded_param, group.mp_policy
                found[id(group)] = ShardedModule(
                    module,
                    [(_name_of(one.sharded_param, names), one) for one in group.fsdp_params],
                    policy.reduce_dtype or policy.param_dtype or first.dtype,
                    group.mesh_info,
                    getattr(group, "reduce_scatter_unused_params", False),
                )
    return list(found.values())


def _groups_of(module: FSDPModule) -> list[Any]:
    """A module's parameter group, torch's FSDPParamGroup: none or one. Raises ValueError where there are
    several."""
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # an older torch, which knows one
        groups = [group for group in (state._fsdp_param_group,) if group is not None]
    if len(groups) > 1:
        raise ValueError(f"{type(module).__name__}: expected one mesh for its parameters, got {len(groups)}")
    return list(groups)


def _name_of(parameter: Tensor, names: dict[Tensor, str]) -> str:
    if parameter not in names:
        raise ValueError("expected a model whose parameters are sharded: make the hook before a forward pass")
    return names[parameter]


def _check_replicas(replicas: DeviceMesh | None) -> DeviceMesh:
    """Raise ValueError where there are no replicas between which to exchange."""
    if replicas is None:
        raise ValueError(f"replicas: without them there is nothing to compress: expected {HOW}, got None")
    if replicas.ndim != 1:
        raise ValueError(f"replicas: expected a mesh of one dimension ({HOW}), got {replicas.ndim}")
    if replicas.size() == 1:
        raise ValueError("replicas: expected at least 2, got 1: there is nothing to compress")
    return replicas


def _shard_group(sharded: list[ShardedModule]) -> dist.ProcessGroup:
    """The group over which all modules are sharded. Raises ValueError where they differ, or FSDP itself
    averages over replicas."""
    groups: dict[tuple[int, ...], dist.ProcessGroup] = {}
    for one in sharded:
        if one.mesh_info.replicate_mesh_dim is not None:
            raise ValueError(
                f"expected {HOW}; got a mesh of {one.mesh_info.mesh.ndim} dimensions, over which FSDP itself "
                "averages between replicas, before any hook"
            )
        group = one.mesh_info.shard_process_group
        groups[tuple(dist.get_process_group_ranks(group))] = group
    if len(groups) != 1:
        raise ValueError(f"expected one shard group for all modules, got {sorted(groups)}")
    (group,) = groups.values()
    return group


def _check_all_sharded(model: nn.Module, sharded: list[ShardedModule]) -> None:
    """Raise ValueError, which names a parameter of which the hook would see no gradient."""
    seen = {name for one in sharded for name, _ in one.parameters}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name not in seen:
            raise ValueError(f"parameter {name}: expected it in a module given to fully_shard, got another")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("expected parameters to train, got none that requires a gradient")
