"""`userfault info`."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from userfault.cli._output import DebugOption, JsonOption, command, print_json, table_console
from userfault.sizes import format_size

if TYPE_CHECKING:
    from userfault.cli._opened import Opened
    from userfault.sources import Description

__all__ = ["info"]

_MOST_TENSORS = 40


@command
def info(
    url: Annotated[str, typer.Argument(help="File, folder or URL of an array.", show_default=False)],
    dtype: Annotated[
        str | None, typer.Option(help="Type of the elements of a raw file, such as '<f4'.")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="Shape of a raw file, such as 1000,512.")] = None,
    offset: Annotated[int, typer.Option(help="Where the elements of a raw file begin.", min=0)] = 0,
    *,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Tell what an array is, how its bytes would be served, and what memory a scan wants.

    Only headers and metadata are read.
    """
    from userfault.cli._opened import RawOptions, opened

    with opened(url, RawOptions.parse(dtype, shape, offset)) as found:
        facts = _facts(url, found, raw=dtype is not None)
    if as_json:
        print_json(facts)
    else:
        _print(facts)


def _facts(url: str, found: Opened, *, raw: bool) -> dict[str, Any]:
    memory = found.memory
    description = memory.description if memory is not None else None
    extra = dict(description.extra) if description is not None else {}
    single = None if found.is_mapping else found.arrays[""]
    stored = _stored_bytes(url)
    return {
        "url": url,
        "format": extra.get("format") or _format_of(url, found, raw=raw),
        "dtype": None if single is None else str(single.dtype),
        "shape": None if single is None else list(single.shape),
        "order": None if single is None else "C" if single.flags.c_contiguous else "F",
        "arrays": {
            name: {"dtype": str(array.dtype), "shape": list(array.shape), "nbytes": array.nbytes}
            for name, array in found.arrays.items()
            if name
        },
        "chunks": extra.get("chunks"),
        "shards": extra.get("shards"),
        "codecs": extra.get("codecs"),
        "nbytes": memory.nbytes if memory is not None else 0,
        "stored_bytes": stored,
        "block": memory.block if memory is not None else None,
        "blocks": memory.nblocks if memory is not None else 0,
        "scan_bytes": _scan_bytes(found),
        "served_by": _served_by(found, description),
        "reads_at_once": description.concurrency if description is not None else None,
    }


def _format_of(url: str, found: Opened, *, raw: bool) -> str:
    if raw:
        return "raw"
    return "safetensors" if found.is_mapping else "npy" if ".npy" in Path(url).name else "array"


def _stored_bytes(url: str) -> int | None:
    """Add up the files of a local array; None if it is somewhere else."""
    if "://" in url and not url.startswith("file://"):
        return None
    root = url.removeprefix("file://")
    total = 0
    try:
        if stat.S_ISREG(os.stat(root).st_mode):
            return os.path.getsize(root)
        for folder, _, names in os.walk(root):
            total += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
    except OSError:
        return None
    return total


def _scan_bytes(found: Opened) -> int | None:
    """Return the memory that a scan wants: what its source keeps decoded, and the blocks around it."""
    memory = found.memory
    if memory is None:
        return None
    decoded = memory.description.wants_cache if memory.description is not None else 0
    # Two extents: the one that is read, and the one that is loaded ahead of it.
    return min(decoded + 2 * max(memory.block, 2 << 20), decoded + memory.nbytes)


def _served_by(found: Opened, description: Description | None) -> str:
    if found.memory is None:
        return "nothing: there are no elements"
    if description is None:
        return "the engine itself, from the file"
    where = "one worker process, which shares decoded chunks" if description.affinity else "worker processes"
    return f"{where}, up to {description.concurrency} reads at once in each"


def _print(facts: dict[str, Any]) -> None:
    from userfault.reports.tables import facts_table

    size, stored = facts["nbytes"], facts["stored_bytes"]
    ratio = f" ({size / stored:.1f} times smaller)" if stored and size > 1.05 * stored else ""
    lines = {
        "location": facts["url"],
        "format": facts["format"],
        "type": facts["dtype"],
        "shape": _by(facts["shape"]),
        "order": facts["order"],
        "arrays": f"{len(facts['arrays'])}" if facts["arrays"] else None,
        "chunks": _by(facts["chunks"]),
        "shards": _by(facts["shards"]),
        "codecs": ", ".join(facts["codecs"] or ()),
        "size": f"{format_size(size)} ({size:,} bytes)",
        "stored": None if stored is None else format_size(stored) + ratio,
        "blocks": f"{facts['blocks']:,} of {format_size(facts['block'])}" if facts["block"] else None,
        "a scan wants": None
        if facts["scan_bytes"] is None
        else f"{format_size(facts['scan_bytes'])} of memory",
        "served by": facts["served_by"],
    }
    console = table_console()
    console.print(facts_table({name: value for name, value in lines.items() if value}))
    if facts["arrays"]:
        _print_arrays(facts["arrays"])


def _print_arrays(arrays: dict[str, Any]) -> None:
    from userfault.reports.tables import facts_table

    largest = sorted(arrays.items(), key=lambda item: -item[1]["nbytes"])
    shown = {
        f"  {name}": f"{array['dtype']} {_by(array['shape'])}, {format_size(array['nbytes'])}"
        for name, array in largest[:_MOST_TENSORS]
    }
    console = table_console()
    console.print(facts_table(shown))
    if len(largest) > _MOST_TENSORS:
        console.print(f"  and {len(largest) - _MOST_TENSORS} smaller ones (--json lists all)")


def _by(lengths: list[int] | None) -> str:
    if lengths is None:
        return ""
    return " × ".join(f"{length:,}" for length in lengths) or "a single element"
