"""PowerSGD: low-rank factors of every matrix by a step of power iteration that starts from the last one."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from reducers.common import Leveled, average
from reducers.lowrank import (
    Matrices,
    add_products,
    each,
    multiply,
    multiply_factors,
    orthonormalize,
    subtract_products,
    transposed,
)
from sage.config import Named
from sage.draws import Draws
from sage.interfaces import Communicator, Seeds, Slot


class PowerSGDSettings(Named):
    name: Literal["powersgd"] = "powersgd"
    rank: int = Field(default=4, ge=1)
    """Of the two factors that stand for a matrix."""
    form: Literal["two_sided", "alternating"] = "two_sided"
    """two_sided (the paper): P and Q each step. alternating (the authors' later library): one of them per
    step, in turn, at half the bytes."""
    iterations: int = Field(default=1, ge=1)
    """alternating: iterations per step, each on what the ones before have left."""
    residual: Literal["local", "mean"] = "local"
    """two_sided: what is left in send is M - P Q_w^T of this worker's own Q_w, or (the published code) M
    minus the mean. The means that follow are the same; the local residual is smaller."""
    orthogonalization: Literal["qr", "gram_schmidt"] = "qr"
    """qr: by Householder reflections on a CPU; on a GPU both are Gram-Schmidt, which is quicker there."""
    warm_start: bool = True
    """Start from the last step's factors; false: from new random ones each step."""
    min_compression_rate: float = Field(default=2.0, ge=0)
    """Matrices that would not become smaller by more than this are sent whole, as vectors are."""
    start_step: int = Field(default=0, ge=0)
    """The first step with compression; the gradient is averaged exactly before it."""


class PowerSGD(Leveled):
    """M ~ P Q^T, with M (n, m) = shape[0] x rest, P (n, r), Q (m, r), one of them orthonormal.

    Vogels, Karimireddy and Jaggi 2019, arXiv 1905.13727, algorithm 1; alternating: 2020, arXiv 2008.01425,
    algorithm 1. Vectors travel exactly, in the round of the first factor. A NaN reaches all of its matrix.
    """

    Settings: ClassVar[type[Named]] = PowerSGDSettings
    state_names = ("p", "q", "generator", "step")
    held_names = ("p", "q")

    def __init__(
        self, config: PowerSGDSettings, layout: list[Slot], *, seeds: Seeds, device: torch.device
    ) -> None:
        self.config, self.layout, self.device, self.step = config, layout, device, 0
        self.generator = Draws(seeds.common)
        self.set_levels([config.rank] * len(layout))

    def set_levels(self, levels: Sequence[int]) -> None:
        """Use these ranks, one per slot, from now on; new factors are drawn."""
        # numbers sent / r (n + m): 1, or half of it per iteration
        cost = 1.0 if self.config.form == "two_sided" else self.config.iterations / 2
        self.matrices = Matrices(self.layout, levels, self.config.min_compression_rate * cost)
        self.p, self.q = self._draw(self.matrices.left_size), self._draw(self.matrices.right_size)

    def notes(self) -> list[str]:
        return self.matrices.notes(self.config.rank)

    def slot_slices(self, name: str, layout: list[Slot]) -> list[slice] | None:
        if name not in ("p", "q"):
            return None
        return self.matrices.left_slices(layout) if name == "p" else self.matrices.right_slices(layout)

    def _draw(self, size: int) -> Tensor:
        return self.generator.normal(size, self.device)

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        compressed_steps = self.step - self.config.start_step
        self.step += 1
        if compressed_steps < 0:
            average(send, mean, comm)
            return
        if compressed_steps and not self.config.warm_start:
            self.p, self.q = self._draw(self.p.numel()), self._draw(self.q.numel())
        if self.config.form == "two_sided":
            self._reduce_two_sided(send, mean, comm)
        else:
            self._reduce_alternating(send, mean, comm, compressed_steps * self.config.iterations)
        for vector in self.matrices.wholes(send):
            vector.zero_()

    def _reduce_two_sided(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        ms, left, right = self.matrices.of(send), self.matrices.left_blocks, self.matrices.right_blocks
        # 1. P = M Q: its sum over workers, made orthonormal
        multiply(ms, each(right(self.q)), out=each(left(self.p)))
        self._sum(self.p, comm, send, mean)
        orthonormalize(left(self.p), self.config.orthogonalization)
        # 2. Q = M^T P, averaged
        multiply(transposed(ms), each(left(self.p)), out=each(right(self.q)))
        own = self.q.clone()
        self._sum(self.q, comm)
        self.q.div_(comm.world_size)
        # 3. mean = P Q^T;  send = M - P Q_w^T, or M - mean
        ps, qs, means = each(left(self.p)), each(right(self.q)), self.matrices.of(mean)
        if self.config.residual == "local" and comm.world_size > 1:
            multiply_factors(ps, qs, out=means)
            add_products(ms, ps, each(right(own)), alpha=-1)
        else:
            subtract_products(ms, ps, qs, out=means)

    def _reduce_alternating(self, send: Tensor, mean: Tensor, comm: Communicator, count: int) -> None:
        """count: the iterations before this step's. At even ones P is given and Q found, else the reverse."""
        ms, left, right = self.matrices.of(send), self.matrices.left_blocks, self.matrices.right_blocks
        means = self.matrices.of(mean)
        for iteration in range(count, count + self.config.iterations):
            is_even = iteration % 2 == 0
            ps, qs = each(left(self.p)), each(right(self.q))
            # 1. Q = M^T P with P orthonormal, or P = M Q with Q orthonormal
            orthonormalize(left(self.p) if is_even else right(self.q), self.config.orthogonalization)
            multiply(transposed(ms) if is_even else ms, ps if is_even else qs, out=qs if is_even else ps)
            # 2. M = M - P Q_w^T
            add_products(ms, ps, qs, alpha=-1)
            # 3. what was found, averaged, in the first round with the vectors;  mean = mean + P Q^T
            found, is_first = self.q if is_even else self.p, iteration == count
            self._sum(found, comm, *((send, mean) if is_first else ()))
            found.div_(comm.world_size)
            if is_first:
                multiply_factors(ps, qs, out=means)
            else:
                add_products(means, ps, qs, alpha=1)

    def _sum(self, factor: Tensor, comm: Communicator, *send_and_mean: Tensor) -> None:
        """Replace a factor by its sum over workers; the same round averages the vectors of send to mean."""
        vectors = [self.matrices.wholes(flat) for flat in send_and_mean]
        message = torch.cat([factor, *(vectors[0] if vectors else [])])
        if message.numel():
            comm.all_reduce(message)
        factor.copy_(message[: factor.numel()])
        if vectors and self.matrices.whole:
            sums = message[factor.numel() :].div_(comm.world_size)
            torch._foreach_copy_(vectors[1], list(sums.split([vector.numel() for vector in vectors[1]])))

    def expected_payload_bytes(self, world_size: int) -> int:
        less, more = sorted((self.matrices.left_size, self.matrices.right_size))
        iterations = self.config.iterations
        alternating = iterations // 2 * less + (iterations + 1) // 2 * more
        sides = less + more if self.config.form == "two_sided" else alternating
        return 4 * (sides + self.matrices.whole_size) if world_size > 1 else 0
