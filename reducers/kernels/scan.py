"""The scan: one pass over a gradient that adds it to what is to be sent and lists what reaches a bound."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Form = Callable[[Tensor, Tensor | None, Tensor, bool], Tensor]
CHUNK = 65_536
"""Elements per step of the scan on the CPU: send, gradient and scratch of a chunk stay in a core's cache
together."""


def scan(send: Tensor, grad: Tensor | None, bound: Tensor, selects_nan: bool = False) -> Tensor:
    """send += grad (where one is given), and the ascending indices (k,) int64 of |send| >= bound.

    send, grad (n,), contiguous; bound is a scalar of their dtype and device. NaN is not listed, and nothing
    reaches a bound of NaN; selects_nan: NaN reaches every bound, and everything reaches NaN.
    """
    return form_for(send.device)(send, grad, bound, selects_nan)


def form_for(device: torch.device) -> Form:
    """The form that scan uses on a device."""
    return scan_in_chunks if device.type == "cpu" else scan_whole


def scan_whole(send: Tensor, grad: Tensor | None, bound: Tensor, selects_nan: bool) -> Tensor:
    """The form of scan for any device: operations on whole tensors."""
    if grad is not None:
        send.add_(grad)
    magnitude = send.abs()
    reached = (magnitude < bound).logical_not_() if selects_nan else magnitude >= bound
    return reached.nonzero().view(-1)  # host synchronisation: how many there are


def scan_in_chunks(send: Tensor, grad: Tensor | None, bound: Tensor, selects_nan: bool) -> Tensor:
    """The form of scan for the CPU, in chunks that stay in cache: numpy on the tensors' own memory, since its
    calls cost less than torch's."""
    flat, n, limit = send.numpy(), send.numel(), bound.numpy()
    added = None if grad is None else grad.numpy()
    magnitude = np.empty(min(CHUNK, n), flat.dtype)
    reached = np.empty(min(CHUNK, n), np.bool_)
    found = [np.empty(0, np.int64)]
    with np.errstate(all="ignore"):  # inf - inf and overflow are as silent as in torch
        for start in range(0, n, CHUNK):
            part = flat[start : start + CHUNK]
            size = part.size
            if added is not None:
                np.add(part, added[start : start + CHUNK], out=part)
            np.abs(part, out=magnitude[:size])
            if selects_nan:
                np.less(magnitude[:size], limit, out=reached[:size])
                np.logical_not(reached[:size], out=reached[:size])
            else:
                np.greater_equal(magnitude[:size], limit, out=reached[:size])
            found.append(np.flatnonzero(reached[:size]) + start)
    return torch.from_numpy(np.concatenate(found))


FORMS: dict[str, Form] = {"whole": scan_whole, "chunks": scan_in_chunks}
