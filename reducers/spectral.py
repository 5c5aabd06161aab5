"""What svd and atomo share: the matrices' singular values, and messages of a few rank-1 atoms of each.

With U the left singular vectors of a matrix A, A = sum_i u_i (u_i^T A); one term is an atom. A matrix that is
taller than wide is transposed first: (short, long).
"""

from abc import abstractmethod
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from reducers.lowrank import Matrices
from sage.config import Named
from sage.interfaces import Communicator, Reducer, Slot


class SpectralSettings(Named):
    rank: int = Field(default=2, ge=1)
    """Atoms per matrix. One whose rank atoms are no smaller than itself is sent exactly, as vectors are."""


def wide(matrix: Tensor) -> Tensor:
    """The view (short, long) of a matrix."""
    return matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT


def spectrum(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Squared singular values (count, short) float64, descending, and U^T (count, short, short), for matrices
    (count, short, long).

    From the eigenvectors of A A^T in float64, 20 times as fast as an SVD; float32's products are exact there,
    so singular values down to about 1e-7 of the largest are distinguished. A matrix that is not finite counts
    as 0.
    """
    precise = matrices.double()
    gram = precise @ precise.mT  # (count, short, short)
    finite = gram.isfinite().flatten(1).all(1)  # (count,)
    squares, vectors = torch.linalg.eigh(torch.where(finite[:, None, None], gram, 0.0))  # ascending
    squares = squares.flip(-1)
    # An eigenvalue that rounding made 0 or negative still belongs to a direction that may not be empty.
    squares = squares.clamp(min=torch.finfo(torch.float64).eps * squares[:, :1].clamp(min=0))
    return squares, vectors.flip(-1).mT.to(matrices.dtype)


class Spectral(Reducer):
    """Sends vectors exactly, and of each matrix the atoms that weigh gives a weight, times that weight."""

    Settings: ClassVar[type[Named]] = SpectralSettings

    def __init__(self, config: SpectralSettings, layout: list[Slot], device: torch.device) -> None:
        self.rank = config.rank
        self.matrices = Matrices(layout, [config.rank] * len(layout), min_compression_rate=1.0)
        self.num_matrices = sum(len(group.slots) for group in self.matrices.groups)
        self.target_elements = self.matrices.whole_size + self.matrices.left_size + self.matrices.right_size
        """What a worker sends where each matrix sends rank atoms."""

    def notes(self) -> list[str]:
        return self.matrices.notes(self.rank)

    @abstractmethod
    def weigh(self, squares: Tensor) -> Tensor:
        """The weights (count, short) of the atoms, 0 where one is not sent, from the squared singular values
        (count, short), descending."""

    def encode(self, send: Tensor) -> tuple[list[int], Tensor]:
        """How many atoms each matrix sends; in one vector what is sent whole, then each group's u_i and
        weighted u_i^T A."""
        counts: list[int] = []
        parts, views = self.matrices.wholes(send), iter(self.matrices.of(send))
        for group in self.matrices.groups:
            matrices = torch.stack([wide(next(views)) for _ in group.slots])  # (count, short, long)
            squares, vectors = spectrum(matrices)
            weights = self.weigh(squares).to(send.dtype)
            owners, atoms = weights.nonzero(as_tuple=True)  # host synchronisation: how many there are
            numbers = (weights != 0).sum(1).tolist()
            left = vectors[owners, atoms]  # (atoms, short)
            pieces = zip(left.split(numbers), matrices, strict=True)
            right = torch.cat([piece @ matrix for piece, matrix in pieces])  # (atoms, long)
            right *= weights[owners, atoms, None]
            parts += [left.flatten(), right.flatten()]
            counts += numbers
        return counts, torch.cat(parts)

    def add(self, flat: Tensor, counts: list[int], values: Tensor, factor: float) -> None:
        """flat += factor * what was encoded as counts and values."""
        wholes, views = self.matrices.wholes(flat), iter(self.matrices.of(flat))
        sent_whole, values = values.tensor_split([self.matrices.whole_size])
        for whole, part in zip(wholes, sent_whole.split([whole.numel() for whole in wholes]), strict=True):
            whole.add_(part, alpha=factor)
        for group in self.matrices.groups:
            numbers, counts = counts[: len(group.slots)], counts[len(group.slots) :]
            short, long = sorted((group.rows, group.columns))
            left, right, values = values.tensor_split([sum(numbers) * short, sum(numbers) * (short + long)])
            lefts, rights = left.view(-1, short).split(numbers), right.view(-1, long).split(numbers)
            for u, v in zip(lefts, rights, strict=True):
                # A += factor sum_i u_i v_i^T
                wide(next(views)).addmm_(u.T, v, alpha=factor)

    def reduce(self, send: Tensor, mean: Tensor, comm: Communicator) -> None:
        counts, values = self.encode(send)
        mean.zero_()
        for theirs in self.exchange(counts, values, comm):
            self.add(mean, *theirs, 1 / comm.world_size)
        self.add(send, counts, values, -1.0)

    @abstractmethod
    def exchange(
        self, counts: list[int], values: Tensor, comm: Communicator
    ) -> list[tuple[list[int], Tensor]]:
        """Every worker's counts and values, in rank order."""
