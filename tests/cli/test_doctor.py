"""What `userfault doctor` says, here and where something is missing."""

from __future__ import annotations

import json

from support.cli import run_cli

_BROKEN = """
import errno, sys, userfault.kernel
def refuse(flags=0, path=""):
    raise OSError(errno.EPERM, "no")
module = sys.modules["userfault.kernel.probe"]
module.open_by_syscall = module.open_by_device = refuse
from userfault.cli import main; main()
"""


def test_json_has_every_finding() -> None:
    done = run_cli("doctor", "--json")
    values = json.loads(done.stdout)
    by_name = {finding["name"]: finding for finding in values["findings"]}
    assert {"arrays", "worker processes", "userfaultfd", "missing pages", "poison", "move"} <= set(by_name)
    assert done.returncode == (0 if values["usable"] else 1)
    for finding in by_name.values():
        assert set(finding) == {"name", "since", "available", "level", "enables", "evidence", "fix"}
        assert bool(finding["fix"]) is not finding["available"]


def test_the_table_says_what_works_and_ends_with_a_verdict() -> None:
    done = run_cli("doctor")
    for text in ("since", "here", "what it enables", "missing pages", "userfaultfd access:"):
        assert text in done.stdout
    verdict = done.stdout.strip().splitlines()[-1]
    assert verdict.startswith("Arrays work here." if done.returncode == 0 else "Arrays do not work here")


def test_without_userfaultfd_it_fails_and_says_what_to_do() -> None:
    done = run_cli("doctor", code=_BROKEN)
    assert done.returncode == 1
    assert "Arrays do not work here" in done.stdout
    assert "→" in done.stdout
    assert "EPERM" in done.stdout
    assert json.loads(run_cli("doctor", "--json", code=_BROKEN).stdout)["usable"] is False
