"""What only this reducer does: two steps of each, worked out in numpy, so that none can stand in for another.

A signature takes the gradients (steps, W, n) float64 of two workers and gives the mean (n,) of the last step,
with error feedback where the method leaves something in send.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

import reducers
from reducers import REDUCERS
from reducers.powersgd import PowerSGD
from sage.exchange.comm import LocalComm
from sage.interfaces import Seeds, Slot
from tests import partitions
from tests.cases import LAYOUT, N, gradient, run_steps

Signature = Callable[[np.ndarray], np.ndarray]
MovedParts = Callable[[list[int]], list[np.ndarray]]
GRADIENTS = np.stack([[gradient(rank, step).double().numpy() for rank in range(2)] for step in range(2)])
DENSITY, THRESHOLD = 0.05, 0.03


def mixed(x: int) -> int:
    """SplitMix64's output function."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def number(seed: int, index: int) -> int:
    """SplitMix64's 64 bits at an index."""
    return mixed((seed + index * 0x9E3779B97F4A7C15) % 2**64)


def with_feedback(grads: np.ndarray, sent: Callable[[np.ndarray, int, int], np.ndarray]) -> np.ndarray:
    """sent(send, step, rank) is what a worker sends of send (n,); the rest stays for its next step."""
    memory = np.zeros_like(grads[0])
    for step, grad in enumerate(grads):
        memory += grad
        parts = np.stack([sent(memory[rank].copy(), step, rank) for rank in range(len(memory))])
        memory -= parts
    return parts.mean(0)


def largest(send: np.ndarray, k: int) -> np.ndarray:
    """send with all but its k elements of largest magnitude set to 0."""
    kept = np.zeros_like(send)
    places = np.argsort(-np.abs(send))[:k]
    kept[places] = send[places]
    return kept


def exact(grads: np.ndarray) -> np.ndarray:
    return grads[-1].mean(0)


def topk(grads: np.ndarray) -> np.ndarray:
    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        pieces = [send[slot.start : slot.stop] for slot in LAYOUT]
        return np.concatenate([largest(piece, max(1, int(DENSITY * len(piece)))) for piece in pieces])

    return with_feedback(grads, sent)


def global_topk(grads: np.ndarray) -> np.ndarray:
    return with_feedback(grads, lambda send, step, rank: largest(send, int(DENSITY * N)))


def threshold(grads: np.ndarray) -> np.ndarray:
    return with_feedback(grads, lambda send, step, rank: np.where(np.abs(send) >= THRESHOLD, send, 0))


def sage(grads: np.ndarray) -> np.ndarray:
    samples = [0.0, 0.0]

    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        key = number(Seeds.derive(1, rank).worker, step + 1)
        drawn = [number(key, index) // 2 % N for index in range(int(N / (1 + N * 0.05**2)))]
        before, samples[rank] = samples[rank], np.abs(send[drawn]).mean()
        if step == 0:
            return np.where(np.abs(send) >= THRESHOLD, send, 0)
        moved = THRESHOLD * samples[rank] / before
        exam = (np.abs(send) >= moved).mean()
        gamma = 0.95 if exam < 0.1 * DENSITY else 1.05 if exam > 10 * DENSITY else 1.0
        return np.where(np.abs(send) >= moved * 2 / (1 + np.exp(DENSITY - exam)) * gamma, send, 0)

    return with_feedback(grads, sent)


def powersgd(grads: np.ndarray) -> np.ndarray:
    """Rank 1, from the reducer's own first factors: two steps of Q = M^T P / W, P = orthonormal(M Q)."""
    reducer = REDUCERS["powersgd"](
        REDUCERS["powersgd"].Settings(rank=1), LAYOUT, seeds=Seeds.derive(1, 0), device=torch.device("cpu")
    )
    starts = iter(reducer.state_dict()["q"].numpy().astype(np.float64).copy())
    sends, mean = np.zeros(grads.shape[1:]), np.zeros(N)
    factors = {
        slot.name: np.array([next(starts) for _ in range(len(slot_matrix(grads[0][0], slot)[0]))])
        for slot in LAYOUT
        if len(slot.shape) > 1
    }
    for grad in grads:
        sends = sends + grad
        for slot in LAYOUT:
            part = slice(slot.start, slot.stop)
            mean[part] = sends[:, part].mean(0)
            if slot.name in factors:
                matrix = slot_matrix(mean, slot)
                left = matrix @ factors[slot.name]
                left /= np.linalg.norm(left)
                factors[slot.name] = matrix.T @ left
                mean[part] = np.outer(left, factors[slot.name]).ravel()
        sends = sends - mean  # the published residual; the means that follow are those of the local one
    return mean


def slot_matrix(flat: np.ndarray, slot: Slot) -> np.ndarray:
    return flat[slot.start : slot.stop].reshape(slot.shape[0], -1)


def accordion(grads: np.ndarray) -> np.ndarray:
    """Low compression, a density of 0.1, before the first decision; vectors whole."""

    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        pieces = [(send[slot.start : slot.stop], len(slot.shape) > 1) for slot in LAYOUT]
        return np.concatenate(
            [largest(piece, len(piece) // 10) if matrix else piece for piece, matrix in pieces]
        )

    return with_feedback(grads, sent)


COMMON = Seeds.derive(1, 0).common


def at(places: set[int]) -> np.ndarray:
    return np.isin(np.arange(N), list(places))


def random_k(grads: np.ndarray) -> np.ndarray:
    masks = []
    for step in range(len(grads)):
        found: set[int] = set()
        for tensor, slot in enumerate(LAYOUT):
            sequence, drawn, index = number(number(COMMON, step + 1), tensor), set[int](), 0
            while len(drawn) < max(1, int(DENSITY * slot.size)):
                drawn.add(slot.start + number(sequence, index) // 2 % slot.size)
                index += 1
            found |= drawn
        masks.append(at(found))
    return with_feedback(grads, lambda send, step, rank: send * masks[step])


def random_block(grads: np.ndarray) -> np.ndarray:
    masks = []
    for step in range(len(grads)):
        key = number(COMMON, step + 1)
        places = {
            slot.start + (number(key, tensor) // 2 + within) % slot.size
            for tensor, slot in enumerate(LAYOUT)
            for within in range(max(1, int(DENSITY * slot.size)))
        }
        masks.append(at(places))
    return with_feedback(grads, lambda send, step, rank: send * masks[step])


def signs(x: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, 1.0, -1.0)


def sign_norm(grads: np.ndarray) -> np.ndarray:
    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        pieces = [send[slot.start : slot.stop] for slot in LAYOUT]
        return np.concatenate([np.abs(piece).mean() * signs(piece) for piece in pieces])

    return with_feedback(grads, sent)


def onebit(grads: np.ndarray) -> np.ndarray:
    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        pieces = [send[slot.start : slot.stop] for slot in LAYOUT]
        return np.concatenate([two_means(piece) for piece in pieces])

    return with_feedback(grads, sent)


def two_means(x: np.ndarray) -> np.ndarray:
    negative = x < 0
    means = [x[mask].mean() if mask.any() else 0.0 for mask in (negative, ~negative)]
    return np.where(negative, *means)


def drawn_words(rank: int, step: int) -> np.ndarray:
    """32 bits for each element: the lower half of a number of 64, and then its upper half."""
    key = number(Seeds.derive(1, rank).worker, step + 1)
    numbers = [number(key, index) for index in range(-(-N // 2))]
    return np.array([half for one in numbers for half in (one % 2**32, one >> 32)])[:N]


def block_int(grads: np.ndarray) -> np.ndarray:
    """Five blocks: the first worker owns the first three."""
    owners = np.repeat([0, 0, 0, 1, 1], [slot.size for slot in LAYOUT])

    def rounded(x: np.ndarray) -> np.ndarray:
        pieces = [x[slot.start : slot.stop] for slot in LAYOUT]
        scales = [np.abs(piece).max() / 127 for piece in pieces]
        return np.concatenate([s * np.round(piece / s) for piece, s in zip(pieces, scales, strict=True)])

    memory = np.zeros_like(grads[0])
    for grad in grads:
        memory += grad
        parts = np.stack([rounded(one) for one in memory])
        mean = rounded(parts.mean(0))
        memory -= parts
        memory += 2 * (parts.mean(0) - mean) * (owners == np.arange(2)[:, None])
    return mean


def qsgd(grads: np.ndarray) -> np.ndarray:
    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        draws, decoded = (drawn_words(rank, step) >> 8) / 2**24, np.zeros(N)
        for slot in LAYOUT:
            for start in range(slot.start, slot.stop, 128):
                here = slice(start, min(start + 128, slot.stop))
                norm = np.linalg.norm(send[here])
                y = 127 * np.abs(send[here]) / norm
                level = np.floor(y) + (draws[here] < y - np.floor(y))
                decoded[here] = np.sign(send[here]) * norm * level / 127
        return decoded

    return with_feedback(grads, sent)


def terngrad(grads: np.ndarray) -> np.ndarray:
    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        draws, decoded = (drawn_words(rank, step) >> 8) / 2**24, np.zeros(N)
        for slot in LAYOUT:
            x, u = send[slot.start : slot.stop], draws[slot.start : slot.stop]
            scale = min(np.abs(x).max(), max(2.5 * x.std(), np.sqrt((x**2).mean())))
            decoded[slot.start : slot.stop] = scale * np.sign(x) * (u * scale < np.abs(x))
        return decoded

    return with_feedback(grads, sent)


def natural(grads: np.ndarray) -> np.ndarray:
    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        mantissa, exponent = np.frexp(np.abs(send.astype(np.float32)))  # in [0.5, 1)
        rest = np.round((2 * mantissa.astype(np.float64) - 1) * 2**23)
        return np.sign(send) * np.ldexp(0.5, exponent + (rest > drawn_words(rank, step) >> 9))

    return with_feedback(grads, sent)


def signsgd(grads: np.ndarray) -> np.ndarray:
    return signs(signs(grads[-1]).sum(0))


def signum(grads: np.ndarray) -> np.ndarray:
    return signs(signs(0.9 * (0.1 * grads[0]) + 0.1 * grads[1]).sum(0))


def by_matrix(send: np.ndarray, approximate: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """send with each matrix, wider than tall, approximated."""
    sent = send.astype(np.float64)
    for slot in LAYOUT:
        if len(slot.shape) > 1:
            matrix = sent[slot.start : slot.stop].reshape(slot.shape[0], -1)
            tall = matrix.shape[0] > matrix.shape[1]
            matrix[:] = approximate(matrix.T).T if tall else approximate(matrix)
    return sent


def svd(grads: np.ndarray) -> np.ndarray:
    def approximate(matrix: np.ndarray) -> np.ndarray:
        u, values, v = np.linalg.svd(matrix, full_matrices=False)
        return (u[:, :2] * values[:2]) @ v[:2]

    return with_feedback(grads, lambda send, step, rank: by_matrix(send, approximate))


def atomo(grads: np.ndarray) -> np.ndarray:
    def approximate(matrix: np.ndarray, key: int) -> np.ndarray:
        u, values, v = np.linalg.svd(matrix, full_matrices=False)
        kept_with, left = np.ones_like(values), 2.0
        for index, value in enumerate(values):
            if value * left <= values[index:].sum():
                kept_with[index:] = values[index:] * left / values[index:].sum()
                break
            left -= 1
        kept = np.array([number(key, index) / 2**64 for index in range(len(values))]) < kept_with
        return (u * values * kept / kept_with) @ v

    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        # Each matrix of LAYOUT has a shape of its own, so each is a draw of its own, in their order.
        keys = iter(number(Seeds.derive(1, rank).worker, 2 * step + index) for index in (1, 2))
        return by_matrix(send, lambda matrix: approximate(matrix, next(keys)))

    return with_feedback(grads, sent)


def gaussian_k(grads: np.ndarray) -> np.ndarray:
    k, z = int(DENSITY * N), -1.959963984540054  # the normal distribution's quantile of 0.025

    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        chosen = send.mean() - z * send.std(ddof=1)
        for _ in range(2):
            count = (np.abs(send) > chosen).sum()
            chosen *= 0.5 if count < 2 * k / 3 else 1.5 if count > 4 * k / 3 else 1
        return np.where(np.abs(send) > chosen, send, 0)

    return with_feedback(grads, sent)


def redsync(grads: np.ndarray) -> np.ndarray:
    """The tree of ratios, written out: 0.5, then 0.25 or 0.75, then an eighth less or more."""
    k = int(DENSITY * N)

    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        size = np.abs(send)
        ratio = 0.5
        for half in (0.25, 0.125, 0):
            above = size > size.mean() + ratio * (size.max() - size.mean())
            if half == 0 or k < above.sum() < 2 * k:
                break
            ratio += -half if above.sum() < k / 2 else half
        return np.where(above, send, 0)

    return with_feedback(grads, sent)


def sidco(grads: np.ndarray) -> np.ndarray:
    """One stage: of the first five steps none is judged."""

    def sent(send: np.ndarray, step: int, rank: int) -> np.ndarray:
        return np.where(np.abs(send) > np.abs(send).mean() * np.log(1 / DENSITY), send, 0)

    return with_feedback(grads, sent)


def at_union(grads: np.ndarray, chosen: Callable[[np.ndarray, int], list[np.ndarray]]) -> np.ndarray:
    """chosen(sends, step): the indices that each of some workers selects. All send what they have there."""
    memory = np.zeros_like(grads[0])
    for step, grad in enumerate(grads):
        memory += grad
        mask = at(set(np.concatenate(chosen(memory, step)).tolist()))
        parts, memory = memory * mask, memory * ~mask
    return parts.mean(0)


def clt_k(grads: np.ndarray) -> np.ndarray:
    k = int(DENSITY * N)
    return at_union(grads, lambda sends, step: [np.argsort(-np.abs(sends[step % 2]))[:k]])


def by_one_threshold(grads: np.ndarray, first: list[np.ndarray], moved: MovedParts) -> np.ndarray:
    """first: the parts of the first step; moved: those of the second, from the counts of the first."""
    counts: list[int] = []

    def chosen(sends: np.ndarray, step: int) -> list[np.ndarray]:
        threshold, parts = THRESHOLD, first
        if step == 1:
            exam = sum(counts) / int(DENSITY * N)
            assert exam > 1.1
            threshold, parts = 1.005 * THRESHOLD, moved(counts)
        own = [parts[(step + rank) % 2] for rank in range(2)]
        found = [part[np.abs(send[part]) >= threshold] for send, part in zip(sends, own, strict=True)]
        counts[:] = map(len, found)
        return found

    return at_union(grads, chosen)


def micro(grads: np.ndarray) -> np.ndarray:
    parts = partitions.slices(N, 2)
    return by_one_threshold(grads, parts, lambda counts: parts)


def exdyna(grads: np.ndarray) -> np.ndarray:
    blocks = partitions.Blocks(N, 7, 2)
    first = blocks.parts()

    def moved(counts: list[int]) -> list[np.ndarray]:
        blocks.move(counts)
        return blocks.parts()

    return by_one_threshold(grads, first, moved)


def deft(grads: np.ndarray) -> np.ndarray:
    of = partitions.layers(LAYOUT, 2)

    def chosen(sends: np.ndarray, step: int) -> list[np.ndarray]:
        counts = [partitions.layer_counts(send, of, int(DENSITY * N)) for send in sends]
        found = []
        for layer, owner in enumerate(partitions.layer_bins(of, counts[step % 2], 2)):
            rank = (owner - step) % 2
            largest_first = np.argsort(-np.abs(sends[rank][of[layer]]))
            count = len(of[layer]) if owner == -1 else counts[rank][layer]
            found.append(of[layer][largest_first[:count]])
        return found

    return at_union(grads, chosen)


SIGNATURES: dict[str, tuple[dict[str, object], Signature]] = {
    "exact": ({}, exact),
    "topk": ({"density": DENSITY}, topk),
    "global_topk": ({"density": DENSITY}, global_topk),
    "threshold": ({"threshold": THRESHOLD}, threshold),
    "sage": ({"threshold": THRESHOLD, "density": DENSITY}, sage),
    "powersgd": ({"rank": 1}, powersgd),
    "accordion": ({}, accordion),
    "random_k": ({"density": DENSITY}, random_k),
    "random_block": ({"density": DENSITY}, random_block),
    "sign_norm": ({}, sign_norm),
    "onebit": ({}, onebit),
    "block_int": ({}, block_int),
    "qsgd": ({}, qsgd),
    "terngrad": ({}, terngrad),
    "natural": ({}, natural),
    "signsgd": ({}, signsgd),
    "signum": ({}, signum),
    "svd": ({"rank": 2}, svd),
    "atomo": ({"rank": 2}, atomo),
    "gaussian_k": ({"density": DENSITY}, gaussian_k),
    "redsync": ({"density": DENSITY}, redsync),
    "sidco": ({"density": DENSITY}, sidco),
    "clt_k": ({"density": DENSITY}, clt_k),
    "micro": ({"threshold": THRESHOLD, "density": DENSITY}, micro),
    "exdyna": ({"threshold": THRESHOLD, "density": DENSITY, "blocks": 7}, exdyna),
    "deft": ({"density": DENSITY}, deft),
}
TOLERANCE = 2.0**-22
"""Relative to the largest magnitude of the mean. Both sides compute in float64: in float32, matrix products
and SVDs depend on the machine, and the second step feeds the first one's rounding back. Only
quantisers' magnitudes are float32, with two roundings of 2^-24 in each of two steps. Two methods differ by
far more."""


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_every_reducer_has_a_signature() -> None:
    assert set(SIGNATURES) == set(REDUCERS)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_reducer_does_what_its_signature_says(name: str) -> None:
    settings, signature = SIGNATURES[name]

    def last_mean(comm: LocalComm) -> np.ndarray:
        config = REDUCERS[name].Settings.model_validate(settings)
        seeds, device = Seeds.derive(1, comm.rank), torch.device("cpu")
        reducer = reducers.build(config, LAYOUT, seeds=seeds, device=device)
        if isinstance(reducer, PowerSGD):
            reducer.p, reducer.q = reducer.p.double(), reducer.q.double()
        memory = torch.zeros(N, dtype=torch.float64)
        steps = run_steps(reducer, comm, range(2), memory, lambda rank, step: gradient(rank, step).double())
        return steps[-1].mean.numpy()

    for mean in LocalComm.run(2, last_mean):
        assert distance(mean, signature(GRADIENTS)) <= TOLERANCE


def test_no_two_signatures_are_alike() -> None:
    means = [signature(GRADIENTS) for _, signature in SIGNATURES.values()]
    for index, mean in enumerate(means):
        assert all(distance(other, mean) > 1000 * TOLERANCE for other in means[:index])
