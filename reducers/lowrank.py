"""What the low-rank methods share: which tensors are matrices, their factors, orthonormal columns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from torch.nn.functional import pad

from sage.interfaces import Slot


def matrix_shape(slot: Slot) -> tuple[int, int] | None:
    """(shape[0], product of the rest); None for a vector and for an empty tensor."""
    return (slot.shape[0], slot.size // slot.shape[0]) if len(slot.shape) > 1 and slot.size else None


@dataclass(frozen=True)
class Group:
    """Matrices of one shape and rank. Their factors lie side by side, so that a batch of them is a view."""

    rows: int
    columns: int
    rank: int
    slots: tuple[Slot, ...]


class Matrices:
    """A layout as matrices, grouped by shape, and the rest, which is sent whole.

    ranks: one per slot; a matrix n x m gets r = min(n, m, its rank), if r (n + m) min_compression_rate < n m.
    Matrices, left and right factors are listed in the groups' order.
    """

    def __init__(self, layout: list[Slot], ranks: Sequence[int], min_compression_rate: float) -> None:
        found: dict[tuple[int, int, int], list[Slot]] = {}
        self.whole: list[Slot] = []
        for slot, rank in zip(layout, ranks, strict=True):
            rows, columns = matrix_shape(slot) or (0, 0)
            r = min(rows, columns, rank)
            if r * (rows + columns) * min_compression_rate < rows * columns:
                found.setdefault((rows, columns, r), []).append(slot)
            else:
                self.whole.append(slot)
        self.groups = [Group(*shape, tuple(slots)) for shape, slots in found.items()]
        self.left_size = sum(len(g.slots) * g.rows * g.rank for g in self.groups)
        self.right_size = sum(len(g.slots) * g.columns * g.rank for g in self.groups)
        self.whole_size = sum(slot.size for slot in self.whole)

    def notes(self, rank: int) -> list[str]:
        """What there is to say of a rank that compresses nothing."""
        if self.groups:
            return []
        return [f"reducer.rank: {rank} makes no matrix of this model smaller, so everything is sent whole"]

    def of(self, flat: Tensor) -> list[Tensor]:
        """Views (n, m) of a flat gradient."""
        return [
            flat[slot.start : slot.stop].view(group.rows, group.columns)
            for group in self.groups
            for slot in group.slots
        ]

    def wholes(self, flat: Tensor) -> list[Tensor]:
        """Views (size,) of a flat gradient: what is not a matrix, or is too small to compress."""
        return [flat[slot.start : slot.stop] for slot in self.whole]

    def left_slices(self, layout: list[Slot]) -> list[slice]:
        """Where each slot's factor lies in the left factors; empty for what is sent whole."""
        return self._factor_slices(layout, [group.rows * group.rank for group in self.groups])

    def right_slices(self, layout: list[Slot]) -> list[slice]:
        """The same in the right factors."""
        return self._factor_slices(layout, [group.columns * group.rank for group in self.groups])

    def _factor_slices(self, layout: list[Slot], sizes: list[int]) -> list[slice]:
        """sizes: of a factor in each group."""
        found, start = dict[str, slice](), 0
        for group, size in zip(self.groups, sizes, strict=True):
            for slot in group.slots:
                found[slot.name] = slice(start, start + size)
                start += size
        return [found.get(slot.name, slice(0, 0)) for slot in layout]

    def left_blocks(self, flat: Tensor) -> list[Tensor]:
        """Views (B, n, r), one per group, of the left factors (left_size,)."""
        shapes = [(len(group.slots), group.rows, group.rank) for group in self.groups]
        return _blocks(flat, shapes)

    def right_blocks(self, flat: Tensor) -> list[Tensor]:
        """Views (B, m, r), one per group, of the right factors (right_size,)."""
        shapes = [(len(group.slots), group.columns, group.rank) for group in self.groups]
        return _blocks(flat, shapes)


def _blocks(flat: Tensor, shapes: list[tuple[int, int, int]]) -> list[Tensor]:
    sizes = [count * rows * rank for count, rows, rank in shapes]
    return [part.view(shape) for part, shape in zip(flat.split(sizes), shapes, strict=True)]


def each(blocks: Iterable[Tensor]) -> list[Tensor]:
    """The matrices of batches, in order."""
    return [matrix for block in blocks for matrix in block]


BLOCK = 262_144
"""Elements of a matrix that subtract_products takes at a time on the CPU: they stay in cache between its two
steps."""


def multiply(matrices: list[Tensor], factors: list[Tensor], out: list[Tensor]) -> None:
    """out_i = M_i F_i: matrices (n, m), factors (m, r), out (n, r).

    One product per matrix: M_i is a view of the flat gradient, and copying it into a batch costs more than
    the product, which only reads it once.
    """
    for matrix, factor, product in zip(matrices, factors, out, strict=True):
        if matrix.device.type == "cpu":
            # M F = (F^T M^T)^T: with the few rows first, the CPU's libraries take about half the time.
            product.copy_(torch.mm(factor.T.contiguous(), matrix.T).T)
        else:
            torch.mm(matrix, factor, out=product)


def multiply_factors(ps: list[Tensor], qs: list[Tensor], out: list[Tensor]) -> None:
    """out_i = P_i Q_i^T: ps (n, r), qs (m, r), out (n, m)."""
    for p, q, product in zip(ps, qs, out, strict=True):
        torch.mm(p, q.T, out=product)


def subtract_products(ms: list[Tensor], ps: list[Tensor], qs: list[Tensor], out: list[Tensor]) -> None:
    """out_i = P_i Q_i^T, then M_i = M_i - out_i: ps (n, r), qs (m, r), ms and out (n, m)."""
    for m, p, q, product in zip(ms, ps, qs, out, strict=True):
        rows = max(1, BLOCK // m.shape[1]) if m.device.type == "cpu" else len(m)
        for part, left, total in zip(m.split(rows), p.split(rows), product.split(rows), strict=True):
            torch.mm(left, q.T, out=total)
            part.sub_(total)


def add_products(out: list[Tensor], ps: list[Tensor], qs: list[Tensor], alpha: float) -> None:
    """out_i += alpha P_i Q_i^T: ps (n, r), qs (m, r), out (n, m)."""
    for total, p, q in zip(out, ps, qs, strict=True):
        total.addmm_(p, q.T, alpha=alpha)


def transposed(matrices: list[Tensor]) -> list[Tensor]:
    return [matrix.T for matrix in matrices]


DEPENDENT = 1e-6
"""A column of which less than this is left by the projection is rounding error, not a direction."""


def orthonormalize(blocks: list[Tensor], method: str) -> None:
    """Replace the columns of each matrix of batches (B, n, r), r <= n, by orthonormal ones, in place.

    They span the same space; where a column is zero or depends on those before it, another direction takes
    its place, so that a factor can grow out of zero again. method: qr (Householder's on the CPU; on a GPU,
    where that is slow for tall thin matrices, Gram-Schmidt) or gram_schmidt. No device is waited for.
    """
    if blocks and blocks[0].device.type != "cpu":
        gram_schmidt_together(blocks)
        return
    for block in blocks:
        if method == "qr":
            block.copy_(torch.linalg.qr(block).Q)
        else:
            _gram_schmidt(block)


def gram_schmidt_together(blocks: list[Tensor]) -> None:
    """Gram-Schmidt on batches (B, n, r) of like sizes at once, so that a GPU is given few operations.

    Rows of zeros, which change nothing, make them as tall as the tallest: less than four times as tall.
    """
    alike: dict[tuple[int, int], list[Tensor]] = {}
    for block in blocks:
        alike.setdefault((block.shape[2], (block.shape[1] - 1).bit_length() // 2), []).append(block)
    for members in alike.values():
        rows = max(block.shape[1] for block in members)
        batch = torch.cat([pad(block, (0, 0, 0, rows - block.shape[1])) for block in members])
        masks = [
            pad(torch.zeros_like(block[:, :, 0]), (0, rows - block.shape[1]), value=1) for block in members
        ]
        _gram_schmidt(batch, torch.cat(masks).bool())
        for block, part in zip(members, batch.split([len(block) for block in members]), strict=True):
            block.copy_(part[:, : block.shape[1]])


def _gram_schmidt(block: Tensor, is_padding: Tensor | None = None) -> None:
    """is_padding (B, n): the rows that stay zero."""
    scale = block.abs().amax(dim=1, keepdim=True)
    block.div_(torch.where(scale > 0, scale, 1.0))  # the squares of huge values would overflow
    for index in range(block.shape[2]):
        column, before = block[:, :, index : index + 1], block[:, :, :index]  # (B, n, 1), (B, n, index)
        length = torch.linalg.vector_norm(column, dim=1, keepdim=True)
        rest = _project_out(column, before)
        dependent = torch.linalg.vector_norm(rest, dim=1, keepdim=True) <= DEPENDENT * length
        rest = torch.where(dependent, _project_out(_freest_unit(before, is_padding), before), rest)
        column.copy_(rest / torch.linalg.vector_norm(rest, dim=1, keepdim=True))


def _project_out(column: Tensor, before: Tensor) -> Tensor:
    """column - B B^T column, twice: once leaves rounding errors of the size of the column."""
    for _ in range(2):
        column = column - before @ (before.mT @ column)
    return column


def _freest_unit(before: Tensor, is_padding: Tensor | None) -> Tensor:
    """(B, n, 1): the unit vector of the row in which the orthonormal columns (B, n, c), c < n, are least.

    Its squared length outside their span is at least 1 - c / n.
    """
    sizes = before.square().sum(dim=2)  # (B, n)
    row = (sizes if is_padding is None else sizes.masked_fill(is_padding, inf)).argmin(dim=1)  # (B,)
    rows = torch.arange(before.shape[1], device=before.device)
    return (rows == row[:, None]).to(before.dtype).unsqueeze(2)
