"""Optimizers (torch's own), parameter groups, the learning-rate schedule and clipping."""

import re
from itertools import pairwise
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, Strict, field_validator, model_validator
from torch import Tensor, nn

from sage.config import Named, Settings, one_line


class Schedule(Settings):
    """lr(e) = base * (1 + (f - 1) * min(e / warmup_epochs, 1)) * decays, with e a fraction of epochs.

    f = batch_per_worker * world_size / reference_batch: linear scaling with a gradual warm-up, after Goyal
    et al. 2017, arXiv 1706.02677, section 2.
    """

    warmup_epochs: float = Field(default=0.0, ge=0)
    """Epochs over which the learning rate goes from the base to its scaled value."""
    reference_batch: Annotated[int, Field(ge=1)] | None = None
    """The global batch that `optimizer.lr` is meant for; null: no scaling."""
    decay_epochs: Annotated[tuple[float, ...], Strict(False)] = ()
    """At each of these epochs the learning rate is multiplied by decay_factor."""
    decay_factor: float = Field(default=0.1, gt=0, le=1)
    """What it is multiplied by there."""

    @field_validator("decay_epochs")
    @classmethod
    def _ascends(cls, epochs: tuple[float, ...]) -> tuple[float, ...]:
        if any(after <= before for before, after in pairwise(epochs)) or any(epoch <= 0 for epoch in epochs):
            raise ValueError(f"expected positive epochs in ascending order, got {one_line(list(epochs))}")
        return epochs

    def factor(self, epoch: float, global_batch: int) -> float:
        """What the base learning rate is multiplied by at a (fractional) epoch."""
        scale = global_batch / self.reference_batch if self.reference_batch else 1.0
        warmth = min(epoch / self.warmup_epochs, 1.0) if self.warmup_epochs else 1.0
        num_decays = sum(epoch >= decay for decay in self.decay_epochs)
        return float((1 + (scale - 1) * warmth) * self.decay_factor**num_decays)


class Clip(Settings):
    """Clipping by the norm of the whole gradient."""

    norm: Annotated[float, Field(gt=0)] | None = None
    """The largest norm let through; null: no clipping."""
    before_reduce: bool = True
    """Clip each worker's gradient before the exchange (true) or the mean after it (false)."""


def clip_norm(grad: Tensor, max_norm: float, norm: Tensor | None = None) -> None:
    """grad *= min(1, max_norm / (norm + 1e-6)), in place and without a host synchronisation.

    norm: grad's, where it is known. The 1e-6 is torch.nn.utils.clip_grad_norm_'s.
    """
    norm = torch.linalg.vector_norm(grad) if norm is None else norm
    grad.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


class PublishedNesterov(torch.optim.Optimizer):
    """SGD with the momentum of SAGE's published code: m = mu m + g, w -= lr (g + m); g includes decay."""

    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            weights: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            grads: list[Tensor] = [p.grad for p in weights if p.grad is not None]
            for weight in weights:
                if "momentum_buffer" not in self.state[weight]:
                    self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
            buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
            # g = grad + wd w;  m = mu m + g;  w -= lr (g + m)
            steps = list(torch._foreach_add(grads, weights, alpha=group["weight_decay"]))
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, steps)
            torch._foreach_add_(steps, buffers)
            torch._foreach_add_(weights, steps, alpha=-group["lr"])


class SGD(Named):
    name: Literal["sgd"] = "sgd"
    lr: float = Field(gt=0)
    """Base learning rate, before the schedule."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """What each step keeps of the one before."""
    nesterov: bool = False
    """Nesterov's momentum, in the form that nesterov_form says."""
    nesterov_form: Literal["torch", "published"] = "torch"
    """torch: the step is g + momentum m, with m the new momentum; published (SAGE's code): g + m."""
    weight_decay: float = Field(default=0.0, ge=0)
    """For weights; normalisation layers and biases have none."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum in (0, 1), got momentum 0")
        return self

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if self.nesterov and self.nesterov_form == "published":
            return PublishedNesterov(groups, lr=self.lr, momentum=self.momentum)
        optimizer = torch.optim.SGD(
            groups, lr=self.lr, momentum=self.momentum, nesterov=self.nesterov, **_implementation(groups)
        )
        if self.momentum:
            optimizer.register_step_pre_hook(_begin_late_momenta)
        return optimizer


class Adam(Named):
    name: Literal["adam"] = "adam"
    lr: float = Field(gt=0)
    """Base learning rate, before the schedule."""
    betas: Annotated[
        tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Strict(False)
    ] = (
        0.9,
        0.999,
    )
    """Of the running means of the gradient and of its square."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """For weights; normalisation layers and biases have none."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.Adam(groups, lr=self.lr, betas=self.betas, eps=self.eps, **_implementation(groups))


def _begin_late_momenta(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Let a momentum begin later than others, where a parameter's first gradient comes later: torch's fused
    SGD has all begin in one step, and raises TypeError otherwise. From zeros it begins as in torch's other
    forms: m = mu 0 + g."""
    for group in optimizer.param_groups:
        used = [parameter for parameter in group["params"] if parameter.grad is not None]
        late = [parameter for parameter in used if optimizer.state[parameter].get("momentum_buffer") is None]
        if len(late) < len(used):
            for parameter in late:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


OPTIMIZERS: dict[str, type[Named]] = {"sgd": SGD, "adam": Adam}


def _implementation(groups: list[dict[str, Any]]) -> dict[str, bool]:
    """Fused where torch has it for these parameters, foreach elsewhere."""
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    return {"fused": True} if fused else {"foreach": True}


_UNDECAYED = (
    nn.modules.batchnorm._NormBase,  # BatchNorm and InstanceNorm of every dimension
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)


_BIAS = re.compile(r"(\w+_)?bias|bias_[ih]h_l\d+(_reverse)?|bias_[ih]h")


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: weights, decayed, and biases and normalisation layers, not.

    A normalisation layer is recognised by its type, a bias by torch's own parameter names (bias,
    in_proj_bias, bias_ih_l0); the model's names for its modules do not matter.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and parameter not in seen:
                seen.add(parameter)  # a tied weight belongs to the first module that holds it
                spared = isinstance(module, _UNDECAYED) or _BIAS.fullmatch(name) is not None
                (undecayed if spared else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(config: Named, model: nn.Module) -> torch.optim.Optimizer:
    """torch's optimizer for the model's trained parameters. config: one of OPTIMIZERS."""
    assert isinstance(config, SGD | Adam)
    return config.build(parameter_groups(model, config.weight_decay))
