"""What the methods that may send a gradient as it is share."""

from torch import Tensor

from sage.interfaces import Communicator


def average(send: Tensor, mean: Tensor, comm: Communicator) -> None:
    """mean = sum_i send_i / W by one all-reduce; send: zeros. Both (n,)."""
    mean.copy_(send)
    comm.all_reduce(mean)
    if comm.world_size > 1:
        mean.div_(comm.world_size)
    send.zero_()
