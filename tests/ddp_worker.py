"""One process of a gloo group that trains through DistributedDataParallel and our hook.

python -m tests.ddp_worker RANK WORLD_SIZE RENDEZVOUS_FILE OUT_FOLDER SCENARIO...
"""

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import reducers
from reducers.exact import Exact
from sage.exchange.attached import local_part
from sage.exchange.bucket import BucketHook
from sage.exchange.comm import DistComm
from sage.exchange.ddp_hook import DDPHook
from sage.interfaces import Communicator, Slot
from tasks.data.digits import read
from tests.cases import CASES, Case
from tests.gloo_worker import join_group
from tests.test_own_loops import Branches, filled
from tests.toy import bits_of

STEPS_PER_EPOCH, LR, BAD_STEP = 2, 0.1, 3
DIGITS_STEPS = 200
FEW_BYTES = {"bucket_cap_mb": 0.0005}
"""Makes several buckets of a small model: 1 before the first backward, 3 after it."""


class Failing(Exact):
    """Cannot exchange several parameters together."""

    def __init__(self, config: Any, layout: list[Slot], **given: Any) -> None:
        super().__init__(config, layout, **given)
        self.num_parameters, self.leaves_nothing = len(layout), False

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        if self.num_parameters > 1:
            raise ArithmeticError("the factors do not fit")


def layers() -> nn.Module:
    return filled(
        nn.Sequential(
            nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Linear(16, 4)
        )
    )


def convolutions() -> nn.Module:
    model = filled(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    )
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def batch(step: int, *shape: int) -> Tensor:
    """Another one on each worker."""
    return torch.randn(shape or (6, 8), generator=torch.Generator().manual_seed(100 * step + dist.get_rank()))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(batch(step)).square().mean()


def wrap(model: nn.Module, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, **{**FEW_BYTES, **options})


def hooked(ddp: DistributedDataParallel, name: str = "exact", **given: Any) -> DDPHook:
    hook = reducers.hook(ddp, name, steps_per_epoch=STEPS_PER_EPOCH, **given)
    hook.set_progress(lr=LR)
    return hook


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """This process's shards, where the model is sharded."""
    return {name: local_part(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def memories(hook: BucketHook) -> dict[str, Tensor]:
    """What waits, by parameter; empty where nothing does."""
    parameters = hook.state_dict()["parameters"]
    return {name: part["feedback.memory"] for name, part in parameters.items() if "feedback.memory" in part}


def spoil(ddp: DistributedDataParallel, spoils: Callable[[], bool]) -> None:
    """Make the gradient of the last bucket NaN on the last worker, where spoils() says so."""

    def to_nan(grad: Tensor) -> Tensor:
        is_spoilt = spoils() and dist.get_rank() == dist.get_world_size() - 1
        return torch.full_like(grad, torch.nan) if is_spoilt else grad

    next(ddp.module.parameters()).register_hook(to_nan)


@dataclass
class Trained:
    """A run of a few steps."""

    means: list[dict[str, Tensor]] = field(default_factory=list)
    own: list[dict[str, Tensor]] = field(default_factory=list)
    """This worker's gradients."""
    waiting: list[dict[str, Tensor]] = field(default_factory=list)
    """What waits after each step."""
    buckets: list[int] = field(default_factory=list)
    state: Any = None


def begin(
    case: Case, saved: dict[str, Any] | None, *, primes: bool, **given: Any
) -> tuple[DistributedDataParallel, DDPHook]:
    """A model and its hook; saved: the weights and the hook's state of another one."""
    ddp = wrap(layers())
    hook = hooked(ddp, case.reducer, **case.settings, **given)
    if saved:
        ddp.module.load_state_dict(saved["weights"])
        hook.load_state_dict(saved["hook"])
    if primes:
        hook.prime(lambda: loss_of(ddp, 99))
    return ddp, hook


def train(case: Case, *, primes: bool = False, reload_at: int = -1, **given: Any) -> dict[str, Any]:
    """Six steps of one row of the table through the hook. reload_at: the step before which everything is made
    anew, with what was saved."""
    trained = Trained()
    ddp, hook = begin(case, None, primes=primes, **given)
    for step in range(6):
        if step == reload_at:
            saved = {"weights": ddp.module.state_dict(), "hook": hook.state_dict()}
            ddp, hook = begin(case, saved, primes=primes, seed=7, **given)
        plain = list(ddp.module.named_parameters())
        own = torch.autograd.grad(loss_of(ddp.module, step), [parameter for _, parameter in plain])
        ddp.zero_grad()
        loss_of(ddp, step).backward()
        trained.means.append(gradients(ddp.module))
        trained.own.append({name: grad for (name, _), grad in zip(plain, own, strict=True)})
        trained.waiting.append(memories(hook))
        trained.buckets.append(len(hook.exchanges))
        with torch.no_grad():  # an optimizer without a state
            for parameter in ddp.parameters():
                parameter.sub_(parameter.grad, alpha=LR)
    trained.state = hook.state_dict()
    return vars(trained)


def skip(case: Case) -> dict[str, Any]:
    """Steps of which one has a bad gradient in its last bucket."""
    ddp = wrap(layers())
    hook = hooked(ddp, case.reducer, **case.settings)
    spoil(ddp, lambda: hook.steps.step == BAD_STEP)
    return pass_bad_step(ddp, hook, lambda step: loss_of(ddp, step))


def pass_bad_step(
    model: nn.Module, hook: BucketHook, compute_loss: Callable[[int], Tensor]
) -> dict[str, Any]:
    """Steps of which somebody spoils BAD_STEP: which can be used, after which the hook's state is as before;
    the bad step's gradients, and those of the step after it."""
    usable, is_same, grads = [], [], []
    for step in range(BAD_STEP + 2):
        before = bits_of({**hook.state_dict(), "step": 0})
        model.zero_grad()
        compute_loss(step).backward()
        usable.append(hook.is_usable)
        is_same.append(bits_of({**hook.state_dict(), "step": 0}) == before)
        grads.append(gradients(model))
    return {"usable": usable, "is_same": is_same, "bad": grads[BAD_STEP], "after": grads[-1]}


def in_reference(
    options: dict[str, Any],
    model_of: Callable[[], nn.Module],
    loss: Callable[[nn.Module, int], Tensor],
    hooks: bool,
) -> list[dict[str, Tensor]]:
    """Gradients of DDP's own all-reduce, or of `exact` through the hook."""
    ddp = wrap(model_of(), **options)
    hook = hooked(ddp) if hooks else None
    seen = []
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LR, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        loss(ddp, step).backward()
        seen.append(gradients(ddp.module))
        optimizer.step()
    del hook
    return seen


def of_branches(model: nn.Module, step: int) -> Tensor:
    """Worker 0 uses the first branch at even steps; nobody ever uses the second."""
    branch = "first" if step % 2 == 0 and dist.get_rank() == 0 else None
    return model(batch(step, 2, 4), branch).square().sum()


def accumulated(model: nn.Module, step: int) -> Tensor:
    """Of three batches; the last one synchronizes."""
    for part in range(2):
        with model.no_sync():  # type: ignore[operator]
            loss_of(model, 10 * step + part).backward()
    return loss_of(model, 10 * step + 2)


def of_images(model: nn.Module, step: int) -> Tensor:
    return model(batch(step, 2, 3, 6, 6).to(memory_format=torch.channels_last)).square().mean()


REFERENCES: dict[str, tuple[dict[str, Any], Callable[[], nn.Module], Callable[[nn.Module, int], Tensor]]] = {
    "plain": ({}, layers, loss_of),
    "one bucket": ({"bucket_cap_mb": 25}, layers, loss_of),
    "gradient_as_bucket_view": ({"gradient_as_bucket_view": True}, layers, loss_of),
    "static_graph": ({"static_graph": True}, layers, loss_of),
    "find_unused_parameters": ({"find_unused_parameters": True}, Branches, of_branches),
    "no_sync": ({}, layers, accumulated),
    "channels_last": ({}, convolutions, of_images),
}
"""What must be DDP's own gradients bit for bit under `exact`: DDP's options, the model, its loss."""


def unused() -> list[dict[str, Tensor]]:
    """What waits for each parameter, where no worker uses some of them."""
    ddp = wrap(Branches(), find_unused_parameters=True)
    hook, seen = hooked(ddp, "global_topk", density=0.2), []
    for step in range(4):
        ddp.zero_grad()
        of_branches(ddp, step).backward()
        seen.append(memories(hook))
    return seen


def half() -> dict[str, Any]:
    """A bfloat16 model: its gradients by the hook, and this worker's."""
    ddp = wrap(layers().to(torch.bfloat16))
    hook = hooked(ddp, feedback="residual")
    own = torch.autograd.grad(ddp.module(batch(0).bfloat16()).square().mean(), list(ddp.module.parameters()))
    ddp(batch(0).bfloat16()).square().mean().backward()
    return {"own": list(own), "mean": list(gradients(ddp.module).values()), "memory": memories(hook)}


def scaled(scale: float) -> dict[str, Any]:
    """Steps under a GradScaler (1: without), one of them bad; the scale at the end."""
    ddp = wrap(layers())
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000, enabled=scale > 1)
    hook = hooked(ddp, "topk", scaler=scaler, density=0.1)
    spoil(ddp, lambda: hook.steps.step == BAD_STEP)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LR)
    for step in range(6):
        optimizer.zero_grad()
        scaler.scale(loss_of(ddp, step)).backward()
        if scale > 1 or hook.is_usable:
            scaler.step(optimizer)
        scaler.update()
    return {"weights": ddp.module.state_dict(), "memory": memories(hook), "scale": scaler.get_scale()}


def joined(name: str | None, **settings: Any) -> dict[str, Tensor]:
    """Weights after training with two batches more on the last worker, under DDP's join."""
    ddp = wrap(layers())
    hook = hooked(ddp, name, **settings) if name else None
    optimizer = torch.optim.SGD(ddp.parameters(), lr=LR)
    with ddp.join():
        for step in range(3 + 2 * (dist.get_rank() == dist.get_world_size() - 1)):
            optimizer.zero_grad()
            loss_of(ddp, step).backward()
            optimizer.step()
    del hook
    return ddp.module.state_dict()


def text_of(call: Callable[[], Any]) -> str:
    """The error that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def errors() -> dict[str, str]:
    """What backward says of what cannot work."""
    failing = wrap(layers())
    hook = reducers.hook(failing, "tests.ddp_worker:Failing", feedback="none")
    told = {"reducer": text_of(lambda: loss_of(failing, 0).backward())}

    scheduled = wrap(layers())
    reducers.hook(scheduled, "topk", scaling={"name": "schedule", "warmup_epochs": 2})
    told["epoch"] = text_of(lambda: loss_of(scheduled, 0).backward())

    other = wrap(layers())
    second = hooked(other, "topk")
    second.load_state_dict({"step": 0, "parameters": {}, "buckets": []})
    told["state"] = text_of(lambda: loss_of(other, 0).backward())

    uneven = wrap(layers())
    hooked(uneven)

    def train_unevenly() -> None:
        with uneven.join(divide_by_initial_world_size=False):
            loss_of(uneven, 0).backward()

    told["join"] = text_of(train_unevenly)
    told["model"] = text_of(lambda: reducers.hook(layers(), "exact"))  # type: ignore[arg-type]
    del hook
    return told


def lost() -> dict[str, str]:
    """The errors of the others when the last rank takes fewer steps: in a plain loop, where it waits until
    they have failed; and under DDP, where its process ends."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    told = {}

    model = layers()
    comm = DistComm(group=dist.new_group(timeout=timedelta(seconds=5)))
    exchange = reducers.attach(model, "exact", comm=comm)
    store = dist.distributed_c10d._get_default_store()

    def take_steps(number: int) -> None:
        for step in range(number):
            loss_of(model, step).backward()
            exchange.step()

    dist.barrier()
    take_steps(1)
    if is_last:
        store.wait(["attached 0", "attached 1"], timedelta(seconds=60))
    else:
        told["attached"] = text_of(lambda: take_steps(1))
        store.set(f"attached {dist.get_rank()}", "")

    ddp = wrap(layers())
    hooked(ddp, "topk")
    for step in range(2):  # before the second one DDP arranges its buckets anew
        loss_of(ddp, step).backward()
    if is_last:
        sys.exit()
    told["ddp"] = text_of(lambda: loss_of(ddp, 2).backward())
    return told


def primed() -> dict[str, Any]:
    """What priming leaves of a model with BatchNorm and dropout; the buckets of each step after it."""
    first, *others = layers()
    model = nn.Sequential(first, nn.BatchNorm1d(16), nn.Dropout(), *others)
    ddp = wrap(filled(model))
    hook = hooked(ddp, "topk")
    before = bits_of({"model": model.state_dict(), "random": torch.get_rng_state()})
    hook.prime(lambda: loss_of(ddp, 99))
    after = bits_of({"model": model.state_dict(), "random": torch.get_rng_state()})
    names = []
    for step in range(2):
        loss_of(ddp, step).backward()
        names.append([[slot.name for slot in exchange.layout] for exchange in hook.exchanges])
    return {"is_same": before == after, "names": names, "step": hook.state_dict()["step"]}


def digits(name: str, seed: int, hooks: bool, **settings: Any) -> float:
    """The accuracy after DIGITS_STEPS on scikit-learn's digits: through the hook, or the flat gradient."""
    data = read()
    learnt, learnt_y, tested, tested_y = map(
        torch.from_numpy, (data.train_x, data.train_y, data.test_x, data.test_y)
    )
    learnt, tested = (x.flatten(1).float() / 16 for x in (learnt, tested))
    torch.manual_seed(seed)
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    if hooks:
        trained: nn.Module = wrap(model, bucket_cap_mb=0.002)
        hook = reducers.hook(trained, name, seed=seed, **settings)  # type: ignore[arg-type]
    else:
        trained, exchange = model, reducers.attach(model, name, seed=seed, **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    rng = torch.Generator().manual_seed(1000 * seed + dist.get_rank())
    for _ in range(DIGITS_STEPS):
        drawn = torch.randint(len(learnt), (32,), generator=rng)
        optimizer.zero_grad()
        nn.functional.cross_entropy(trained(learnt[drawn]), learnt_y[drawn].long()).backward()
        if not hooks:
            exchange.step()
        optimizer.step()
    if hooks:
        assert len(hook.exchanges) > 1
    return (model(tested).argmax(1) == tested_y).float().mean().item()


LEARNED: dict[str, dict[str, Any]] = {
    "topk": {"density": 0.02},
    "powersgd": {"rank": 2},
    "sage": {"density": 0.02},
}


def run(scenario: str) -> Any:
    """What a scenario has seen on this worker."""
    kind, _, detail = scenario.partition(":")
    if kind == "case":
        case = next(case for case in CASES if str(case) == detail)
        return {
            "threaded": train(case),
            "inline": train(case, overlap=False),
            "straight": train(case, primes=True),
            "reloaded": train(case, primes=True, reload_at=3),
            "skipped": skip(case),
        }
    if kind == "reference":
        given = REFERENCES[detail]
        return {"ddp": in_reference(*given, hooks=False), "hook": in_reference(*given, hooks=True)}
    if kind == "learns":
        return {
            way: [digits(detail, seed, way == "hook", **LEARNED[detail]) for seed in range(5)]
            for way in ("hook", "flat")
        }
    others: dict[str, Callable[[], Any]] = {
        "unused": unused,
        "half": half,
        "scaled": lambda: {"with": scaled(1024.0), "without": scaled(1.0)},
        "joined": lambda: {"ddp": joined(None), "hook": joined("exact"), "topk": joined("topk", density=0.1)},
        "errors": errors,
        "primed": primed,
        "lost": lost,
    }
    return others[kind]()


def main(rank: int, world_size: int, rendezvous: str, out: str, scenarios: list[str]) -> None:
    join_group(rank, world_size, rendezvous)
    for number, scenario in enumerate(scenarios):
        torch.save(run(scenario), f"{out}/{number}-{rank}.pt")
        gc.collect()
    if "lost" not in scenarios:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])
