"""One of four gloo processes that train an FSDP2 model: two replicas, each sharded over two processes.

python -m tests.fsdp_worker RANK WORLD_SIZE RENDEZVOUS_FILE OUT_FOLDER SCENARIO...
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import reducers
from sage.exchange.fsdp_hook import FSDPHook
from tests.cases import CASES
from tests.ddp_worker import BAD_STEP, gradients, memories, pass_bad_step, text_of
from tests.gloo_worker import join_group
from tests.test_own_loops import filled
from tests.test_warm_up import compiled

REPLICAS, SHARDS, STEPS_PER_EPOCH, LR = 2, 2, 2, 0.1
NUM_STEPS = 4
FAMILIES = ("exact", "topk", "powersgd")
ROWS = {case.reducer: case for case in reversed(CASES) if case.reducer in FAMILIES}
"""The table's first row of each: one that sends all, selected elements, factors."""


def mesh_of() -> DeviceMesh:
    return init_device_mesh("cpu", (REPLICAS, SHARDS), mesh_dim_names=("replicate", "shard"))


def layers() -> nn.Module:
    """Of sizes that two shards do not divide."""
    return filled(nn.Sequential(nn.Linear(8, 15), nn.Tanh(), nn.Linear(15, 5)))


def sharded(mesh: DeviceMesh, model: nn.Module | None = None, **options: Any) -> nn.Module:
    model = model or layers()
    for module in (model[0], model[2], model):  # type: ignore[index]
        fully_shard(module, mesh=mesh, **options)
    return model


def hooked(mesh: DeviceMesh, name: str = "exact", **given: Any) -> tuple[nn.Module, FSDPHook]:
    model = sharded(mesh["shard"])
    hook = reducers.hook_fsdp(
        model,
        name,
        replicas=mesh["replicate"],
        steps_per_epoch=STEPS_PER_EPOCH,
        **ROWS[name].settings,
        **given,
    )
    hook.set_progress(lr=LR)
    return model, hook


def loss_of(model: nn.Module, step: int, rank: int | None = None) -> Tensor:
    """Of a batch that differs from process to process."""
    rank = dist.get_rank() if rank is None else rank
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(100 * step + rank))
    return model(x).square().mean()


def shard_means(model: nn.Module, step: int) -> dict[str, Tensor]:
    """The mean gradient of this process's replica, this process's part of it; computed without FSDP."""
    plain = layers()
    plain.load_state_dict({name: p.full_tensor() for name, p in model.named_parameters()})
    replica, shard = divmod(dist.get_rank(), SHARDS)
    parameters = list(plain.parameters())
    found = [
        torch.autograd.grad(loss_of(plain, step, replica * SHARDS + peer), parameters)
        for peer in range(SHARDS)
    ]
    means = [(one + other) / 2 for one, other in zip(*found, strict=True)]
    names = (name for name, _ in plain.named_parameters())
    return {name: mean.chunk(SHARDS)[shard] for name, mean in zip(names, means, strict=True)}


def descend(model: nn.Module) -> None:
    with torch.no_grad():  # an optimizer without a state
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=LR)


def train(mesh: DeviceMesh, name: str, reload_at: int = -1) -> dict[str, Any]:
    """Four steps. reload_at: the step before which everything is made anew, with what was saved."""
    model, hook = hooked(mesh, name)
    seen: dict[str, list[Any]] = {"means": [], "own": [], "waiting": [], "weights": []}
    for step in range(NUM_STEPS):
        if step == reload_at:
            weights = {key: p.full_tensor() for key, p in model.named_parameters()}
            state = hook.state_dict()
            plain = layers()
            plain.load_state_dict(weights)
            model = sharded(mesh["shard"], plain)
            hook = reducers.hook_fsdp(
                model,
                name,
                replicas=mesh["replicate"],
                seed=7,
                steps_per_epoch=STEPS_PER_EPOCH,
                **ROWS[name].settings,
            )
            hook.set_progress(lr=LR)
            hook.load_state_dict(state)
        model.zero_grad()
        seen["own"].append(shard_means(model, step))
        loss_of(model, step).backward()
        seen["means"].append(gradients(model))
        seen["waiting"].append(memories(hook))
        descend(model)
        seen["weights"].append({key: p.to_local().clone() for key, p in model.named_parameters()})
    return {**seen, "state": hook.state_dict(), "modules": len(hook.exchanges)}


def native(mesh: DeviceMesh) -> list[dict[str, Tensor]]:
    """Gradients of FSDP's own hybrid sharding."""
    model, seen = sharded(mesh), []
    for step in range(NUM_STEPS):
        model.zero_grad()
        loss_of(model, step).backward()
        seen.append(gradients(model))
        descend(model)
    return seen


def skip(mesh: DeviceMesh) -> dict[str, Any]:
    """Steps of which one has a gradient that is not finite, on one replica, in one shard, in the last module
    of backward."""
    model, hook = hooked(mesh, "topk")
    rows = 15

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if hook.steps.step == BAD_STEP and dist.get_rank() >= SHARDS:
            output.register_hook(lambda grad: grad.index_fill(1, torch.tensor([rows - 1]), torch.inf))

    model[0].register_forward_hook(spoil)  # type: ignore[index]
    return pass_bad_step(model, hook, lambda step: loss_of(model, step))


def warm_up(mesh: DeviceMesh) -> dict[str, Any]:
    """The types for which kernels are compiled before the first step, and after it; the process's first
    scenario."""
    model, _hook = hooked(mesh, "topk")
    before = compiled()
    loss_of(model, 0).backward()
    return {"before": before, "after": compiled()}


def half(mesh: DeviceMesh) -> dict[str, Any]:
    """FSDP reduces in bfloat16: what it leaves with a process, and the mean."""
    policy = MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)
    model = sharded(mesh["shard"], mp_policy=policy)
    loss_of(model, 0).backward()
    own = gradients(model)
    model.zero_grad()
    hook = reducers.hook_fsdp(model, "exact", replicas=mesh["replicate"], feedback="residual")
    loss_of(model, 0).backward()
    return {"own": own, "mean": gradients(model), "memory": memories(hook)}


def unused(mesh: DeviceMesh) -> list[Any]:
    """A module that takes no part in a step keeps what waits for it."""
    model, hook = hooked(mesh, "topk")
    seen = []
    for step in range(3):
        model.zero_grad()
        if step == 1:
            model[2](torch.randn(6, 15)).square().mean().backward()  # type: ignore[index]
        else:
            loss_of(model, step).backward()
        seen.append({"memory": memories(hook), "step": hook.steps.step})
    return seen


def errors(mesh: DeviceMesh) -> dict[str, str]:
    """What cannot be served."""
    model, replicas = sharded(mesh["shard"]), mesh["replicate"]
    outside = layers()
    fully_shard(outside, mesh=mesh["shard"], ignored_params={outside[2].weight})  # type: ignore[index]
    other = layers()
    fully_shard(other[0], mesh=mesh["shard"])  # type: ignore[index]
    fully_shard(other, mesh=replicas)
    both = fully_shard(Both(), mesh=mesh["shard"])
    reducers.hook_fsdp(both, "exact", replicas=replicas)
    alone = init_device_mesh("cpu", (1, 4), mesh_dim_names=("replicate", "shard"))
    calls: dict[str, Callable[[], Any]] = {
        "plain": lambda: reducers.hook_fsdp(layers(), "exact", replicas=replicas),
        "none": lambda: reducers.hook_fsdp(model, "exact"),
        "alone": lambda: reducers.hook_fsdp(sharded(alone["shard"]), "exact", replicas=alone["replicate"]),
        "whole mesh": lambda: reducers.hook_fsdp(model, "exact", replicas=mesh),
        "shards": lambda: reducers.hook_fsdp(model, "exact", replicas=mesh["shard"]),
        "native": lambda: reducers.hook_fsdp(sharded(mesh), "exact", replicas=replicas),
        "outside": lambda: reducers.hook_fsdp(outside, "exact", replicas=replicas),
        "two groups": lambda: reducers.hook_fsdp(other, "exact", replicas=replicas),
        "unused": lambda: both(torch.ones(1, 2)).sum().backward(),
        "ddp": lambda: reducers.hook(model, "exact"),  # type: ignore[arg-type]
        "attach": lambda: reducers.attach(model, "exact"),
    }
    return {what: text_of(call) for what, call in calls.items()}


class Both(nn.Module):
    """Of two layers, one of which is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 4), nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x)


def run(scenario: str, mesh: DeviceMesh) -> Any:
    """What a scenario has seen in this process."""
    if scenario in ROWS:
        return {"straight": train(mesh, scenario), "reloaded": train(mesh, scenario, reload_at=2)}
    others = {
        "warm_up": warm_up,
        "native": native,
        "skip": skip,
        "half": half,
        "unused": unused,
        "errors": errors,
    }
    return others[scenario](mesh)


def main(rank: int, world_size: int, rendezvous: str, out: str, scenarios: list[str]) -> None:
    join_group(rank, world_size, rendezvous)
    mesh = mesh_of()
    for number, scenario in enumerate(scenarios):
        torch.save(run(scenario, mesh), f"{out}/{number}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
