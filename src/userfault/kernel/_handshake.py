"""UFFDIO_API: which features are asked for, and what comes of it."""

from __future__ import annotations

import errno
import os
from fcntl import ioctl
from typing import Final, NamedTuple

from userfault.kernel import abi
from userfault.kernel._opening import OpenWay, open_userfaultfd
from userfault.kernel.errors import FeatureError, UffdError, UsageError, error_from_errno

__all__ = ["NO_FEATURES", "Negotiated", "negotiate"]

NO_FEATURES: Final = abi.Feature(0)


class Negotiated(NamedTuple):
    """What the handshake gave.

    Attributes:
        features: What is on.
        available: What the kernel offers.
        operations: Requests on the descriptor.
    """

    features: abi.Feature
    available: abi.Feature
    operations: abi.Operation


def _ask(fd: int, features: abi.Feature) -> Negotiated | int:
    """Make the handshake. A failed one leaves the descriptor as it was, to be tried again with less."""
    argument = bytearray(abi.API.pack(abi.UFFD_API, int(features), 0))
    try:
        ioctl(fd, abi.Request.API, argument)
    except OSError as failure:
        return failure.errno or errno.EIO
    # The answer says what the kernel *has*, not what is on.
    _, available, operations = abi.API.unpack(argument)
    if features & abi.Feature.WP_ASYNC:
        features |= abi.Feature.WP_UNPOPULATED
    return Negotiated(features, abi.Feature(available), abi.Operation(operations))


def _available() -> abi.Feature:
    """Ask on a descriptor that is thrown away: a successful handshake cannot be made twice."""
    opened = open_userfaultfd(OpenWay.ANY, nonblocking=True, cloexec=True)
    try:
        answer = _ask(opened.fd, NO_FEATURES)
    finally:
        os.close(opened.fd)
    return answer.available if isinstance(answer, Negotiated) else NO_FEATURES


def negotiate(fd: int, required: abi.Feature, optional: abi.Feature) -> Negotiated:
    """Make the handshake with everything required and what there is of the optional features.

    Raises:
        UsageError: RWP_ASYNC without RWP.
        FeatureError: Something required is not there; the descriptor can try again.
        UffdPermissionError: `EVENT_FORK` is required, and this process may not have it.
        UffdError: The kernel refused for another reason.
    """
    if required & abi.Feature.RWP_ASYNC and not (required | optional) & abi.Feature.RWP:
        raise UsageError("RWP_ASYNC without RWP: ask for Feature.RWP | Feature.RWP_ASYNC")
    wanted = required | optional
    answer = _ask(fd, wanted)
    if answer == errno.EPERM and not required & abi.Feature.EVENT_FORK:
        wanted &= ~abi.Feature.EVENT_FORK  # optional, and not for this process
        answer = _ask(fd, wanted)
    if answer == errno.EINVAL:
        available = _available()
        missing = required & ~available
        if missing:
            raise _missing(missing, available)
        wanted = required | (wanted & available)
        if not wanted & abi.Feature.RWP:
            wanted &= ~abi.Feature.RWP_ASYNC
        answer = _ask(fd, wanted)
        if answer == errno.EPERM and not required & abi.Feature.EVENT_FORK:
            answer = _ask(fd, wanted & ~abi.Feature.EVENT_FORK)
    if isinstance(answer, Negotiated):
        return answer
    raise _refused(answer)


def _refused(number: int) -> UffdError:
    return error_from_errno(number, call="UFFDIO_API")


def _missing(missing: abi.Feature, available: abi.Feature) -> FeatureError:
    bits = [bit for bit in range(64) if missing >> bit & 1]
    named = []
    for bit in bits:
        feature = abi.Feature(1 << bit)
        since = abi.FEATURE_SINCE.get(feature)
        named.append(f"{feature.name} (Linux {since})" if since else f"bit {bit} (unknown to this library)")
    return FeatureError(
        f"this kernel ({os.uname().release}) does not have: {', '.join(named)}. It offers {available!r}."
        " Pass what is not vital as optional=",
        missing=missing,
        available=available,
        remedy="a newer kernel, or one built with it; userfault doctor tells which",
    )
