"""What the machine is: versions, bandwidth, and how far float32 is float32 on it."""

import importlib.metadata
from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F  # noqa: N812  its usual name

from benchmarks.gpu.checks import Check, Row, Section, Setup
from benchmarks.gpu.measure import timed

PACKAGES = ("torch", "triton", "numpy", "numba", "pydantic", "scikit-learn")


def versions(setup: Setup) -> Iterator[Row]:
    for name in PACKAGES:
        try:
            yield {"what": name, "version": importlib.metadata.version(name)}
        except importlib.metadata.PackageNotFoundError:
            yield {"what": name, "version": "is missing"}
    if setup.on_gpu:
        properties = torch.cuda.get_device_properties(setup.device)
        yield {"what": "GPU", "version": f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"}
        yield {"what": "CUDA", "version": str(torch.version.cuda)}
        yield {"what": "NCCL", "version": ".".join(str(part) for part in torch.cuda.nccl.version())}
        yield {"what": "cuDNN", "version": str(torch.backends.cudnn.version())}


def bandwidth(setup: Setup) -> Iterator[Row]:
    source = torch.ones(2**20 if setup.small else 2**28, device=setup.device)
    target = torch.empty_like(source)
    timing = timed(lambda: target.copy_(source), setup.device)
    yield {
        "copied, GB": source.nbytes / 1e9,
        "ms": timing.queued,
        "TB/s": 2 * source.nbytes / timing.queued / 1e9,
    }


def rounding(setup: Setup) -> Iterator[Row]:
    """The largest error against float64, as torch starts: TF32 keeps 10 bits of each factor."""
    rng = torch.Generator().manual_seed(0)
    size = 32 if setup.small else 512

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng).to(setup.device)

    a, b = draw(size, size), draw(size, size)
    images, kernels = draw(4, 16, 16, 16), draw(16, 16, 3, 3)
    exact = F.conv2d(images.double(), kernels.double(), padding=1)
    product, convolution = a @ b - a.double() @ b.double(), F.conv2d(images, kernels, padding=1) - exact
    flags = {
        "matrix product": torch.backends.cuda.matmul.allow_tf32,
        "convolution": torch.backends.cudnn.allow_tf32,
    }
    for (what, flag), error in zip(flags.items(), (product, convolution), strict=True):
        yield {"as torch starts": what, "may use TF32": flag, "largest error": error.abs().max().item()}


def checks(setup: Setup) -> list[Check]:
    return [Check(measure.__name__, partial(measure, setup)) for measure in (versions, bandwidth, rounding)]


SECTION = Section(
    "facts", "Versions, the bandwidth of a copy, and how far a float32 product is one.", 10, checks
)
