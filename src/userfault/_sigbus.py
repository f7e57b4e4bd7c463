"""Direct delivery stands on our handler of SIGBUS. Another library may put its own in its place."""

from __future__ import annotations

import os
import warnings

from userfault import _engine
from userfault.errors import KernelError

__all__ = ["rearm", "warn_if_replaced"]

_told = False


def rearm() -> bool:
    """Put userfault's handler of SIGBUS back, in front of whichever has taken its place.

    Arrays with `delivery="direct"` need it: without it the next fault ends the process, as a bus error would.
    `faulthandler.enable()` and PyTorch's data loaders install handlers of their own; call this afterwards. What is no
    fault of such an array still goes to them. `userfault.open(..., delivery="direct")` does it as well.

    Returns:
        Whether it was needed.

    Raises:
        KernelError: The handler cannot be installed, for want of memory.
    """
    global _told
    if _engine.direct_armed():
        return False
    try:
        _engine.direct_arm()
    except _engine.EngineError as error:
        raise KernelError(
            f"the handler of SIGBUS cannot be installed ({os.strerror(error.errno)})",
            call="sigaction",
            errno=error.errno,
        ) from None
    _told = False
    return True


def warn_if_replaced(name: str, stacklevel: int) -> None:
    """Say once, until `rearm` is called, that faults of the memory `name` would end the process."""
    global _told
    if _told or _engine.direct_armed():
        return
    _told = True
    warnings.warn(
        f"{name} has delivery='direct', but another library has replaced userfault's handler of SIGBUS since it was "
        "opened (faulthandler.enable() and PyTorch's data loaders do): its next page fault ends the process with a bus "
        "error. Call userfault.rearm(), which passes real bus errors on to the other handler",
        RuntimeWarning,
        stacklevel=stacklevel + 1,
    )
