"""A session of an Icechunk repository, and for writing one session after the other.

Icechunk's stores are those of zarr; but one that is written shows and keeps its changes only when its session is
committed, and is of no more use then. A session that is open for writing is not pickled as it is: what goes to the
worker is a fork of it, which holds the way to the repository and the snapshot that it began from.
"""

from __future__ import annotations

import pickle
from typing import Any

from userfault.errors import ModeError, SourceError, SourcePickleError
from userfault.sources._stores._abc import KeyStore
from userfault.sources._stores._zarr import ZarrKeyStore
from userfault.sources._zarr_recipe import Mode

__all__ = ["IcechunkStore", "icechunk_store"]


class IcechunkStore(KeyStore):
    """An array in the repository of a session, to be written: `sync` makes one commit, and begins a new session.

    Args:
        fork: A pickled `icechunk.ForkSession`.
        path: Path of the array.
        branch: The branch to commit to.
    """

    concurrency = 16
    transactional = True

    def __init__(self, fork: bytes, path: str, branch: str) -> None:
        self.location = f"icechunk {branch}:/{path}"
        self.zarr_path = path
        self._fork = fork
        self._branch = branch
        self._session: Any = None

    def _open(self) -> Any:
        if self._session is None:
            from icechunk.session import Session

            # A fork may not commit, so that the workers of a job do not do it each for itself; but this one is alone.
            self._session = Session(pickle.loads(self._fork)._session)
        return self._session

    def get(self, key: str) -> Any | None:
        """Return the bytes at `key`, as of this session."""
        return ZarrKeyStore(self._open().store, self.zarr_path).get(key)

    def zarr_store(self, *, writable: bool = False) -> Any:
        """Return the store of this session."""
        return self._open().store

    def sync(self, nbytes: int) -> bool:
        """Commit, on top of what others have committed if they have not written the same chunks."""
        import icechunk

        session = self._open()
        if not session.has_uncommitted_changes:
            return False
        message = f"userfault: {nbytes} bytes of /{self.zarr_path}"
        began = session.snapshot_id
        try:
            session.commit(message, rebase_with=icechunk.ConflictDetector())
        except Exception as error:  # Icechunk's errors have no common base
            detail = _first_line(error)
            tip = self._start_again(session)
            raise SourceError(
                f"{self.location} was not committed: {detail}. What was to be written is kept"
                + (
                    f", and the next flush writes it on top of {tip}, over what others changed there since {began}"
                    if tip != began
                    else ""
                ),
                detail=detail,
            ) from error
        # A session that has committed is of no more use. The next one begins where the first one did, is brought to the
        # tip, and is what all later ones begin from: what the first one began from may expire in a long run. (It is not
        # used itself: Icechunk warns of a session that commits beside its forks.)
        self._session = None
        session = self._open()
        session.rebase(icechunk.ConflictDetector())
        self._fork = pickle.dumps(session.fork())
        self._session = None
        return True

    def _start_again(self, session: Any) -> str:
        """Bring the session to the tip of the branch, without changes; return which snapshot it has then."""
        import icechunk

        session.discard_changes()
        try:
            session.rebase(icechunk.ConflictDetector())
        except Exception:  # no connection, say: the next flush meets the same conflict, and comes here again
            return str(session.snapshot_id)
        return str(session.snapshot_id)


def icechunk_store(store: Any, path: str, mode: Mode) -> KeyStore:
    """Return the store for the array at `path` in an `icechunk.IcechunkStore`.

    Raises:
        ModeError: It is to be written, and its session is not on a branch, or has changes of its own.
        SourcePickleError: It is to be read, and its session has changes that no other process can see.
    """
    session = store.session
    if session.read_only:
        if mode == "r+":
            raise ModeError(
                f"this Icechunk session is of one snapshot ({session.snapshot_id}) and read-only: give an array of "
                "repository.writable_session(branch).store, or open it with mode='c' for changes that stay private"
            )
        return ZarrKeyStore(store, path)
    if session.has_uncommitted_changes:
        refusal = ModeError if mode == "r+" else SourcePickleError
        raise refusal(
            "this Icechunk session has changes that are not committed, and that a worker process would not see: "
            "commit them, and open the array in a new session"
        )
    fork = session.fork()
    if mode == "r":
        return ZarrKeyStore(fork.store, path)
    return IcechunkStore(pickle.dumps(fork), path, session.branch)


def _first_line(error: Exception) -> str:
    # A report of several lines, the first one with a cross before it.
    return str(error).strip().partition("\n")[0].removeprefix("x ").strip() or type(error).__name__
