"""Which of Debian's kernel packages a kernel of the matrix is: read from the index of a suite."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

# In the order of their age. "stable" is the newest release that Debian's stable users are given.
MATRIX = ("6.1", "6.12", "stable", "7.3")
_SUITES = {"6.1": ("bookworm",), "6.12": ("trixie",), "stable": ("trixie-backports",)}
# Where any other series is looked for: `KERNELS=6.19` is possible too.
_OTHER_SUITES = ("experimental", "trixie-backports", "sid")

# Since 7.0 vmlinuz is in linux-binary-*, and linux-image-* only depends on it and on linux-modules-*.
_KERNEL = re.compile(r"linux-(?P<part>image|binary|modules)-(?P<abi>(?P<series>\d+\.\d+)\S*)-cloud-amd64")


@dataclass(frozen=True, slots=True)
class Package:
    """One kernel package of an index."""

    name: str
    version: str
    part: str
    abi: str
    series: str


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel and the packages that its vmlinuz and modules are in."""

    series: str
    version: str
    packages: tuple[str, ...]


def is_kernel_name(name: str) -> bool:
    """Tell whether a name can be a kernel of the matrix: "stable" or a release series."""
    return name == "stable" or re.fullmatch(r"\d+\.\d+", name) is not None


def suites(name: str) -> tuple[str, ...]:
    """Return the suites that a kernel is looked for in, the likeliest first."""
    return _SUITES.get(name, _OTHER_SUITES)


def kernel_packages(index: str) -> Iterator[Package]:
    """Yield the kernel packages of a Packages index."""
    for paragraph in index.split("\n\n"):
        if not paragraph.lstrip("\n").startswith("Package: linux-"):
            continue
        fields = dict(line.split(": ", 1) for line in paragraph.splitlines() if ": " in line)
        if found := _KERNEL.fullmatch(fields["Package"]):
            yield Package(fields["Package"], fields["Version"], *found.group("part", "abi", "series"))


def choose(name: str, packages: Iterable[Package]) -> Kernel | None:
    """Choose the newest kernel that a name stands for."""
    by_abi: dict[str, dict[str, Package]] = {}
    for package in packages:
        if name in ("stable", package.series):
            by_abi.setdefault(package.abi, {})[package.part] = package
    bootable = [parts for parts in by_abi.values() if parts.keys() & {"image", "binary"}]
    if not bootable:
        return None

    def main(parts: dict[str, Package]) -> Package:
        return parts["binary"] if "binary" in parts else parts["image"]

    parts = max(bootable, key=lambda parts: version_key(main(parts).version))
    chosen = main(parts)
    names = (chosen.name, *([parts["modules"].name] if "modules" in parts else []))
    return Kernel(chosen.series, chosen.version, names)


def version_key(version: str) -> tuple[int, list[object], list[object]]:
    """Return what versions are sorted by (deb-version(7)): epoch, upstream version, revision."""
    epoch, _, rest = version.rpartition(":")
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return int(epoch or 0), _parts(upstream), _parts(revision)


def _parts(text: str) -> list[object]:
    # Always: not a number, number, not a number, number ... so that like is compared with like.
    pieces = re.findall(r"(\D*)(\d*)", text)
    return [part for other, number in pieces for part in (_letters(other), int(number or 0))]


def _letters(text: str) -> list[int]:
    """Sort letters before everything else, `~` before even the end."""
    return [-1 if c == "~" else ord(c) if c.isalpha() else ord(c) + 256 for c in text] + [0]
