"""What the prepared npz files say of themselves."""

import math
import zipfile
from pathlib import Path

import numpy as np

Headers = dict[str, tuple[tuple[int, ...], np.dtype]]
"""name -> (shape, type)"""


def read_headers(file: Path) -> Headers:
    """The arrays' shapes and types, without reading the arrays. A damaged file raises in many ways."""
    headers: Headers = {}
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            with archive.open(name) as member:
                version = np.lib.format.read_magic(member)
                read_header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read_header(member)
                if member.tell() + math.prod(shape) * dtype.itemsize != archive.getinfo(name).file_size:
                    raise ValueError(f"{name} is not as long as it says")
                headers[name.removesuffix(".npy")] = (shape, dtype)
    return headers
