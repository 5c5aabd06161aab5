"""The arithmetic of matrix products and convolutions: the one place for torch's switches.

Unless told otherwise, torch rounds the inputs of a GPU's float32 convolutions to TF32's 10 bits, but not
those of matrix products. Here both are float32, and `precision: tf32` is for forward and backward alone, so
that a reducer's own products and the scores are float32 in every run.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal
from warnings import catch_warnings, simplefilter

import torch

Precision = Literal["float32", "tf32", "bfloat16"]
FIRST_WITH_TF32 = (8, 0)
"""The compute capability of the first GPUs that have TF32 and fast bfloat16 (A100)."""


def allow_tf32(allowed: bool) -> None:
    """Let float32 matrix products and convolutions round their inputs to TF32, or not; for all threads.

    These names are understood by every torch from 2.6 on. The newer ones (fp32_precision) are not to be mixed
    with them: torch.compile still reads the old ones.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed  # convolutions and recurrent layers


def allows_tf32() -> tuple[bool, bool]:
    """Whether matrix products and convolutions may round their inputs to TF32 now."""
    return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32


def set_up_arithmetic(deterministic: bool) -> None:
    """Make float32 mean float32 in this process; let cuDNN try its algorithms where runs need not repeat."""
    with catch_warnings():
        simplefilter("ignore")  # torch 2.9 and 2.10 recommend the newer names, once
        allow_tf32(False)
    torch.backends.cudnn.benchmark = not deterministic


@contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Where enabled, let the with-block's matrix products and convolutions be in TF32.

    This switch is the whole process's: of simulated workers only one may be in such a block at a time, so
    the block must not wait for another worker.
    """
    if enabled:
        allow_tf32(True)
    try:
        yield
    finally:
        if enabled:
            allow_tf32(False)


def precision_notes(precision: Precision, device: torch.device) -> list[str]:
    """What the user of a precision should know about this device, a line each."""
    if precision != "tf32":
        return []
    if device.type != "cuda":
        return ["precision: tf32 has no effect on a CPU, which computes in float32"]
    if torch.cuda.get_device_capability(device) < FIRST_WITH_TF32:
        return [f"precision: tf32 has no effect on {torch.cuda.get_device_name(device)}: it has float32 only"]
    return []
