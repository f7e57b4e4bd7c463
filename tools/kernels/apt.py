"""One suite of Debian through apt in a private configuration: the machine's own lists and packages stay as they are.

The machine's apt configuration is read too, so that proxies, passwords and certificates are those of the machine; the
mirror is the one that its sources name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# An index younger than this is not fetched again, unless it names a package that has gone.
FRESH_S = 12 * 3600
PATIENCE_S = 300
KEYRING_NAMES = ("debian-archive-keyring.pgp", "debian-archive-keyring.gpg")
KEYRINGS = tuple(Path("/usr/share/keyrings", name) for name in KEYRING_NAMES)


class UnavailableError(Exception):
    """A kernel cannot be had now: no apt, no mirror, no network, or no such package."""


def find_mirror() -> str:
    """Return the address of the Debian mirror that this machine installs from.

    Raises:
        UnavailableError: It has none; then USERFAULT_DEBIAN_MIRROR can name one.
    """
    if named := os.environ.get("USERFAULT_DEBIAN_MIRROR"):
        return named.rstrip("/")
    if shutil.which("apt-get") is None:
        raise UnavailableError("apt-get is not here, and Debian's kernels come through it")
    wanted = ("--format", "$(LABEL) $(REPO_URI)", "Identifier: Packages")
    listed = _run(["apt-get", "indextargets", "--no-release-info", *wanted])
    mirror = choose_mirror(line.split(" ", 1) for line in listed.splitlines())
    if mirror is None:
        raise UnavailableError(
            "no Debian mirror is among this machine's apt sources; USERFAULT_DEBIAN_MIRROR=http://... names one"
        )
    return mirror


def choose_mirror(targets: Iterable[Sequence[str]]) -> str | None:
    """Choose Debian's own archive among (label, address) pairs, as apt lists them.

    Where the lists were removed (a container image) apt does not know the labels; then the address has to tell.
    """
    pairs = [(label, address.rstrip("/")) for label, address in targets]
    for label, address in pairs:
        if label == "Debian":
            return address
    for label, address in pairs:
        if label == "$(LABEL)" and address.endswith("/debian"):
            return address
    return None


def newest_keyring(mirror: str, folder: Path) -> Path | None:
    """Fetch Debian's newest keys, for a machine older than the suites: signed by keys that it trusts."""
    for name in ("trixie", "bookworm"):
        suite = Suite(name, mirror, folder / name)
        try:
            suite.update()
            package = suite.download("debian-archive-keyring")
        except UnavailableError:
            continue
        found = extract(package, lambda path: Path(path).name in KEYRING_NAMES)
        for path, content in found.items():
            target = folder / Path(path).name
            target.write_bytes(content)
            return target
    return None


def extract(package: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Return the files of a .deb whose paths (from the root, without a slash before) are wanted."""
    files = {}
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = member.name.removeprefix("./")
            if member.isfile() and wanted(path) and (file := archive.extractfile(member)):
                files[path] = file.read()
    if process.returncode != 0:
        raise UnavailableError(f"{package.name} is damaged: dpkg-deb ended with {process.returncode}")
    return files


@dataclass(frozen=True, slots=True)
class Suite:
    """A suite of the mirror, with its index and downloads in a folder of its own."""

    name: str
    mirror: str
    folder: Path
    keyring: Path | None = None

    def update(self, *, force: bool = False) -> None:
        """Fetch the index, unless it is fresh.

        Raises:
            UnavailableError: The mirror did not answer, or this machine does not trust the keys that sign the suite.
        """
        stamp = self.folder / "updated"
        self._write_configuration()
        if not force and stamp.exists() and time.time() - stamp.stat().st_mtime < FRESH_S:
            return
        stamp.unlink(missing_ok=True)
        self._apt("apt-get", "update", "--error-on=any")
        stamp.touch()

    def index(self) -> str:
        """Return the text of its Packages index."""
        path = self._apt("apt-get", "indextargets", "--format", "$(FILENAME)", "Identifier: Packages").strip()
        return self._apt("/usr/lib/apt/apt-helper", "cat-file", path)

    def download(self, package: str, version: str | None = None) -> Path:
        """Fetch a package and return the file; apt compares it with the signed index."""
        target = self.folder / "packages"
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        self._apt("apt-get", "download", f"{package}={version}" if version else package, cwd=target)
        return next(target.glob("*.deb"))

    def _write_configuration(self) -> None:
        for name in ("state/lists/partial", "cache/archives/partial"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        keyring = self.keyring or next((path for path in KEYRINGS if path.exists()), None)
        signed_by = f" signed-by={keyring}" if keyring else ""
        source = f"deb [arch=amd64{signed_by}] {self.mirror} {self.name} main\n"
        (self.folder / "sources.list").write_text(source)
        settings = {
            "Dir::Etc::sourcelist": self.folder / "sources.list",
            "Dir::Etc::sourceparts": "-",
            "Dir::State": self.folder / "state",
            "Dir::State::lists": self.folder / "state/lists",
            "Dir::Cache": self.folder / "cache",
            "APT::Architecture": "amd64",
            "Acquire::Languages": "none",
            "Acquire::Retries": "2",
            "Acquire::http::Timeout": "20",
            "Acquire::https::Timeout": "20",
            # The cache is in a user's home, where the user `_apt` may not go.
            "APT::Sandbox::User": "root",
        }
        lines = [f'{name} "{value}";\n' for name, value in settings.items()]
        (self.folder / "apt.conf").write_text("".join(lines))

    def _apt(self, program: str, *arguments: str, cwd: Path | None = None) -> str:
        return _run([program, "-q", "-c", str(self.folder / "apt.conf"), *arguments], cwd=cwd)


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            cwd=cwd,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-6:]
        raise UnavailableError("\n".join([f"{' '.join(command)}: exit {done.returncode}", *said]))
    return done.stdout
