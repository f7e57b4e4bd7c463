"""`USERFAULT_WATCH`: the first array opens the socket of `userfault watch`."""

from __future__ import annotations

from userfault import options

__all__ = ["be_watched"]


def be_watched() -> None:
    """Open the socket if the environment asks for it."""
    if options.watch():
        # What it needs nobody else does.
        from userfault.observe import serve_where_asked

        serve_where_asked()
