"""The files that the documentation's examples open."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_samples(folder: Path) -> None:
    """Write small files under the names that the documentation uses.

    `temperature.npy`, `frames.raw` (float32, 100 x 64 x 64), `model.safetensors`, `climate.zarr` (an array
    `t2m`, zstd), `survey.h5` (a dataset `depth`).
    """
    # Here, not above: the other users of this package do without them.
    import h5py
    import numpy as np
    import zarr

    rng = np.random.default_rng(2)
    temperature = rng.normal(285, 10, (2000, 180)).astype("f4")
    np.save(folder / "temperature.npy", temperature)
    rng.random((100, 64, 64), dtype="f4").tofile(folder / "frames.raw")

    group = zarr.open_group(folder / "climate.zarr", mode="w")
    t2m = group.create_array(
        "t2m", shape=(1000, 60, 40), chunks=(100, 60, 40), dtype="f4", compressors=zarr.codecs.ZstdCodec()
    )
    t2m[:] = rng.normal(285, 10, (1000, 60, 40)).astype("f4")

    with h5py.File(folder / "survey.h5", "w") as survey:
        survey["depth"] = rng.random((512, 256))

    write_safetensors(
        folder / "model.safetensors",
        {
            "embeddings.weight": rng.random((5000, 96), dtype="f4"),
            "head.weight": rng.random((96, 10), dtype="f4"),
            "head.bias": rng.random(10, dtype="f4"),
        },
    )


def write_safetensors(path: Path, arrays: dict) -> None:
    """Write float32 arrays in the safetensors format: length of the header, the header as JSON, the bytes."""
    header, offset = {}, 0
    for name, array in arrays.items():
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": [offset, offset + array.nbytes]}
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in arrays.values():
            file.write(array.tobytes())
