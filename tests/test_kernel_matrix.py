"""The machinery of `make test-kernels`, but for what needs QEMU or a mirror."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from kernels import apt, download, expected, initramfs, packages, report  # noqa: E402
from kernels.__main__ import main  # noqa: E402
from kernels.cpio import Archive  # noqa: E402
from kernels.results import NOT_AN_EVENT, Results, as_dict, combined  # noqa: E402

# --- the archive


def _listing(archive: Archive) -> dict[str, tuple[int, int, bytes]]:
    """Read an archive as the kernel does: name -> (mode, mtime, content)."""
    data, at, found = b"".join(archive.pieces()), 0, {}
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        _, mode, _, _, _, mtime, size, *_, name_size, _ = fields
        name = data[at + 110 : at + 110 + name_size - 1].decode()
        at += (110 + name_size + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert at == len(data)
            return found
        assert name not in found
        found[name] = (mode, mtime, data[at : at + size])
        at += (size + 3) // 4 * 4


def test_an_archive_holds_what_was_put_with_the_folders_above_first() -> None:
    archive = Archive()
    archive.file("/a/b/c", b"12345", mode=0o755, mtime=77)
    archive.link("/a/d", "b/c")
    archive.folder("/tmp", mode=0o1777)
    archive.file("/empty", b"")
    assert _listing(archive) == {
        "a": (0o040755, 0, b""),
        "a/b": (0o040755, 0, b""),
        "a/b/c": (0o100755, 77, b"12345"),
        "a/d": (0o120777, 0, b"b/c"),
        "tmp": (0o041777, 0, b""),
        "empty": (0o100644, 0, b""),
    }
    assert list(_listing(archive))[:3] == ["a", "a/b", "a/b/c"]


def test_a_folder_keeps_the_mode_that_it_was_given_before_its_files() -> None:
    archive = Archive()
    archive.folder("/tmp", mode=0o1777)
    archive.file("/tmp/x", b"1")
    assert _listing(archive)["tmp"][0] == 0o041777


def test_copying_follows_links_as_they_are_here(tmp_path: Path) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "real" / "inner" / "file").write_bytes(b"content")
    (tmp_path / "folder").symlink_to("real")
    (tmp_path / "real" / "other").symlink_to(tmp_path / "real" / "inner" / "file")
    archive = Archive()
    archive.copy(tmp_path / "folder" / "other")
    archive.copy(tmp_path / "folder" / "inner" / "file")
    below = str(tmp_path).lstrip("/")
    listing = _listing(archive)
    found = {name.removeprefix(f"{below}/"): listing[name] for name in listing if f"{below}/" in name}
    assert {name: entry[2] for name, entry in found.items()} == {
        "folder": b"real",
        "real": b"",
        "real/other": bytes(tmp_path / "real/inner/file"),
        "real/inner": b"",
        "real/inner/file": b"content",
    }
    assert found["real/inner/file"][1] == int((tmp_path / "real/inner/file").stat().st_mtime)


# --- what is in it


def test_a_compiled_file_is_never_compared_with_its_source(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text("value = 6 * 7\n")
    archive = Archive()
    archive.copy(source)
    initramfs.compile_all(archive)
    ((path, entry),) = [(p, e) for p, e in archive.entries.items() if p.endswith(".pyc")]
    assert Path(path) == tmp_path / "__pycache__" / f"module.{sys.implementation.cache_tag}.pyc"
    assert isinstance(entry.content, bytes)
    (tmp_path / "__pycache__").mkdir()
    Path(path).write_bytes(entry.content)
    source.write_text("value = 'changed'\n")
    code = "import sys; sys.path[:0] = sys.argv[1:]; import module; print(module.value)"
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


# --- which kernel


@pytest.mark.parametrize(
    ("older", "newer"),
    [("1.0", "1.1"), ("1.9", "1.10"), ("7.3~rc7-1~exp1", "7.3-1"), ("7.3~rc7-1~exp1", "7.3~rc10-1~exp1"),
     ("7.2.12-1~bpo13+1", "7.2.12-1"), ("6.1.176-1", "6.1.176-1+b1"), ("9.9", "1:0.1"), ("1.0", "1.0a"),
     ("1.0a", "1.0+"), ("6.12.94-1", "6.12.107-1"), ("1-1", "1-1.1")],
)  # fmt: skip
def test_versions_are_in_debians_order(older: str, newer: str) -> None:
    assert packages.version_key(older) < packages.version_key(newer)
    assert packages.version_key(older) == packages.version_key(older)


def _index(*entries: tuple[str, str]) -> str:
    rest = "Description: a: b\nDepends: kmod, linux-base\n"
    return "\n".join(f"Package: {name}\nVersion: {version}\n{rest}" for name, version in entries)


def _choose(name: str, *entries: tuple[str, str]) -> packages.Kernel | None:
    return packages.choose(name, packages.kernel_packages(_index(*entries)))


def test_the_newest_of_a_series_is_chosen() -> None:
    chosen = _choose(
        "6.1",
        ("linux-image-6.1.0-9-cloud-amd64", "6.1.27-1"),
        ("linux-image-6.1.0-50-cloud-amd64", "6.1.176-1"),
        ("linux-image-6.1.0-50-cloud-amd64-dbg", "6.1.176-1"),
        ("linux-image-6.1.0-51-cloud-amd64-unsigned", "6.1.177-1"),
        ("linux-image-6.12.9-cloud-amd64", "6.12.9-1"),
        ("linux-image-6.1.0-52-amd64", "6.1.178-1"),
    )
    assert chosen == packages.Kernel("6.1", "6.1.176-1", ("linux-image-6.1.0-50-cloud-amd64",))


def test_the_image_is_in_the_binary_package_where_there_is_one() -> None:
    chosen = _choose(
        "stable",
        ("linux-image-6.16.3+deb13-cloud-amd64", "6.16.3-1~bpo13+1"),
        ("linux-image-7.2.9+deb13-cloud-amd64", "7.2.9-1~bpo13+1"),
        ("linux-binary-7.2.9+deb13-cloud-amd64", "7.2.9-1~bpo13+1"),
        ("linux-modules-7.2.9+deb13-cloud-amd64", "7.2.9-1~bpo13+1"),
        # On its way into the archive: without an image it cannot boot.
        ("linux-modules-7.3.4+deb13-cloud-amd64", "7.3.4-1~bpo13+1"),
    )
    names = ("linux-binary-7.2.9+deb13-cloud-amd64", "linux-modules-7.2.9+deb13-cloud-amd64")
    assert chosen == packages.Kernel("7.2", "7.2.9-1~bpo13+1", names)


def test_a_series_that_is_not_there_is_none() -> None:
    assert _choose("7.3", ("linux-image-6.1.0-9-cloud-amd64", "6.1.27-1")) is None
    assert _choose("7.3") is None


def test_every_kernel_has_suites() -> None:
    assert all(packages.suites(name) for name in (*packages.MATRIX, "6.19"))
    assert all(packages.is_kernel_name(name) for name in packages.MATRIX)
    assert not packages.is_kernel_name("newest")


@pytest.mark.parametrize(
    ("targets", "mirror"),
    [
        ([("Debian-Security", "http://m/security/"), ("Debian", "http://m/all/")], "http://m/all"),
        # Without lists apt knows no labels.
        ([("$(LABEL)", "http://m/debian-security/"), ("$(LABEL)", "http://m/debian/")], "http://m/debian"),
        ([("Node Source", "https://n/debian"), ("$(LABEL)", "http://m/ubuntu/")], None),
        ([], None),
    ],
)
def test_the_mirror_is_the_machines(targets: list[tuple[str, str]], mirror: str | None) -> None:
    assert apt.choose_mirror(targets) == mirror


def test_another_mirror_can_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERFAULT_DEBIAN_MIRROR", "http://mirror.example/debian/")
    assert apt.find_mirror() == "http://mirror.example/debian"


def test_without_a_mirror_the_last_kernel_is_used_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing is here"))
    monkeypatch.delenv("USERFAULT_DEBIAN_MIRROR", raising=False)
    with pytest.raises(apt.UnavailableError, match="apt-get is not here"):
        download.kernel("6.1", tmp_path)
    (tmp_path / "6.1").mkdir()
    (tmp_path / "6.1" / "kernel.json").write_text(json.dumps({"series": "6.1", "version": "6.1.176-1"}))
    kernel, warning = download.kernel("6.1", tmp_path)
    assert (kernel.version, kernel.vmlinuz) == ("6.1.176-1", tmp_path / "6.1" / "vmlinuz")
    assert warning is not None
    assert "from the cache" in warning


# --- what a machine says

BOOT = ["boot", "6.1.0-50-cloud-amd64", 3.5]
BEGIN = ["step", "pytest"]
END = [["finish", 0], ["step-end", "pytest", 0, 9.0], ["off"]]


def _results(expected_ids: list[str], *events: list[Any]) -> Results:
    results = Results(expected_ids)
    for event in events:
        results.feed(json.dumps(event))
    return results


def _test(number: int, outcome: str = "passed", *more: str) -> list[list[Any]]:
    return [["begin", number], ["end", number, outcome, 1.5, *more]]


def test_a_run_without_trouble() -> None:
    results = _results(["t::a"], BOOT, BEGIN, *_test(0), *END)
    assert report.problems(results) == []
    assert not report.needs_console(results)
    facts = as_dict(results)
    assert facts["tests"] == {"passed": 1}
    assert facts["seconds"] == {"boot": 3.5, "pytest": 9.0}
    assert facts["slowest"] == {"t::a": 1.5}
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("outcome", ["failed", "error"])
def test_what_failed_is_shown(outcome: str) -> None:
    results = _results(
        ["t::a", "t::b"], BOOT, BEGIN, *_test(0, outcome, "", "E  assert 1 == 2"), *_test(1), *END
    )
    (problem,) = report.problems(results)
    assert problem == "t::a\n  E  assert 1 == 2"


@pytest.mark.parametrize(
    ("code", "said", "outcome", "text"),
    [(0, "", "passed", ""), (77, "why\nno such thing\n", "skipped", ""), (1, "line 7", "failed", "exit 1\nline 7"),
     (-11, "", "failed", "signal 11"), (None, "slow", "failed", "no end in time\nslow")],
)  # fmt: skip
def test_a_programs_exit_code_says_how_it_went(code: int | None, said: str, outcome: str, text: str) -> None:
    results = _results([], BOOT, ["program", "test_x"], ["program-end", "test_x", code, 1.0, said], ["off"])
    assert results.programs["test_x"].outcome == outcome
    assert results.failures().get("test_x", "").startswith(text)
    assert results.skips() == ({"test_x: no such thing": ["test_x"]} if code == 77 else {})


def test_a_machine_that_hangs_says_in_which_test() -> None:
    results = _results(["t::a", "t::hangs"], BOOT, BEGIN, *_test(0), ["begin", 1])
    (problem,) = report.problems(results)
    assert "in pytest, while t::hangs was running" in problem
    assert report.needs_console(results)
    (problem,) = report.problems(Results())
    assert "before the tests" in problem


@pytest.mark.parametrize("code", [0, 1, -6, None])
def test_pytest_that_breaks_off_says_in_which_test(code: int | None) -> None:
    # faulthandler's watchdog ends it with 1, as if there had been failures.
    results = _results(["t::a"], BOOT, BEGIN, ["begin", 0], ["step-end", "pytest", code, 9.0], ["off"])
    broke_off, vanished = report.problems(results)
    assert "while t::a was running" in broke_off
    assert "1 tests were collected on this machine and not run inside" in vanished
    assert report.needs_console(results)


@pytest.mark.parametrize("code", [2, 3, 4, 5])
def test_pytest_that_cannot_work_is_a_trouble(code: int) -> None:
    end = [["finish", code], ["step-end", "pytest", code, 9.0], ["off"]]
    (problem,) = report.problems(_results(["t::a"], BOOT, BEGIN, *_test(0), *end))
    assert f"exit {code}" in problem


def test_tests_that_vanish_are_named() -> None:
    inside = ["collected", ["t::a", "t::new"]]
    new = [["begin", "t::new"], ["end", "t::new", "passed", 0.1]]
    vanished, more = report.problems(
        _results(["t::a", "t::gone"], BOOT, BEGIN, inside, *_test(0), *new, *END)
    )
    assert "t::gone" in vanished
    assert "t::new" in more


def test_a_module_that_cannot_be_collected_is_a_trouble() -> None:
    broken = ["uncollected", "t.py", "failed", "", "no module x"]
    assert "no module x" in report.problems(_results(["t::a"], BOOT, BEGIN, broken, *_test(0), *END))[0]


def test_skips_are_sorted_by_their_reasons() -> None:
    module = ["uncollected", "t.py", "skipped", "needs x", ""]
    skipped, broken = _test(0, "skipped", "needs MOVE (Linux 6.8)", ""), _test(1, "xfailed", "a defect", "")
    results = _results(["t::a", "t::b"], BOOT, BEGIN, module, *skipped, *broken, *END)
    assert results.skips() == {
        "needs x": ["t.py"],
        "needs MOVE (Linux 6.8)": ["t::a"],
        "xfail: a defect": ["t::b"],
    }
    assert report.problems(results) == []


def test_what_is_no_event_is_refused() -> None:
    for line in (
        "",
        "[    1.0] a kernel message",
        '["boot"]',
        '["unknown"]',
        '{"boot": 1}',
        "[]",
        "7",
        '["begin", 5]',
    ):
        with pytest.raises(NOT_AN_EVENT):
            Results().feed(line)


def test_the_machines_of_a_kernel_are_told_together() -> None:
    pytest_part = _results(["t::a"], BOOT, BEGIN, *_test(0), *END)
    program = [
        ["program", "test_x"],
        ["program-end", "test_x", 0, 2.5, ""],
        ["step-end", "engine", 0, 2.5],
        ["off"],
    ]
    whole = combined([pytest_part, _results([], BOOT, *program)])
    assert whole.ended
    text = report.summary(whole)
    for part in ("boot 3.5 s", "pytest 9.0 s: 1 passed", "engine 2.5 s: 1 passed", "slow 2.5 s: test_x"):
        assert part in text
    assert not combined([pytest_part, _results([], BOOT)]).ended


def test_the_end_of_the_console_is_shown_with_what_the_emulator_said(tmp_path: Path) -> None:
    (tmp_path / "console").write_text("".join(f"line {number}\r\n" for number in range(100)) + "Kernel panic")
    (tmp_path / "log").write_text("qemu: killed\n")
    shown = report.console_tail(tmp_path / "console", tmp_path / "log").splitlines()
    assert shown[-3:] == ["  | line 99", "  | Kernel panic", "  | qemu: killed"]
    assert "  | line 50" not in shown


MODULE = """
import pytest
import unittest

def test_passes(): pass
def test_fails(): assert 1 == 2
def test_skips(): pytest.skip("needs x")
@pytest.mark.skip(reason="never")
def test_is_skipped(): pass
@pytest.mark.xfail(reason="a defect")
def test_is_known_to_fail(): assert False
@pytest.fixture
def broken(): raise OSError("setup")
def test_setup_fails(broken): pass
@pytest.fixture
def leaves():
    yield
    raise OSError("teardown")
def test_teardown_fails(leaves): pass
def test_skips_and_teardown_fails(leaves): pytest.skip("needs y")
"""


def test_the_plugin_tells_what_pytest_says(tmp_path: Path) -> None:
    (tmp_path / "test_module.py").write_text(MODULE)
    (tmp_path / "test_other.py").write_text(
        "import pytest\npytest.skip('needs z', allow_module_level=True)\n"
    )

    def run(*arguments: str, **env: str) -> Results:
        events = tmp_path / "events"
        events.unlink(missing_ok=True)
        env |= {**os.environ, "MATRIX_EVENTS": str(events), "PYTHONPATH": str(initramfs.GUEST)}
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-c",
            os.devnull,
            "--rootdir",
            tmp_path,
            "-p",
            "no:cacheprovider",
        ]
        subprocess.run(
            [*command, "-p", "matrix_plugin", *arguments, tmp_path], env=env, check=False, capture_output=True
        )
        results = Results(json.loads(ids.read_text()) if "MATRIX_IDS" in env else [])
        for line in events.read_text().splitlines():
            results.feed(line)
        return results

    ids = tmp_path / "ids.json"
    outside = run("--collect-only")
    assert outside.collected is not None
    assert len(outside.collected) == 8
    ids.write_text(json.dumps(outside.collected))
    inside = run(MATRIX_IDS=str(ids))
    assert inside.collected is None
    assert inside.exit_status == 1
    names = {id.rpartition("::")[2]: outcome for id, outcome in inside.tests.items()}
    assert {name: (outcome.outcome, outcome.reason) for name, outcome in names.items()} == {
        "test_passes": ("passed", ""),
        "test_fails": ("failed", ""),
        "test_skips": ("skipped", "needs x"),
        "test_is_skipped": ("skipped", "never"),
        "test_is_known_to_fail": ("xfailed", "a defect"),
        "test_setup_fails": ("error", ""),
        "test_teardown_fails": ("error", ""),
        "test_skips_and_teardown_fails": ("error", "needs y"),
        "test_other.py": ("skipped", "needs z"),
    }
    assert "assert 1 == 2" in names["test_fails"].text
    assert "OSError: teardown" in names["test_teardown_fails"].text
    assert all(outcome.seconds >= 0 for outcome in inside.tests.values())


# --- which skips are expected


def test_reasons_come_back_as_they_were_written(tmp_path: Path) -> None:
    reasons = {"needs MOVE (Linux 6.8)", 'quoted "x" \\ back', "two\nlines", "µ \x7f \t"}
    path = tmp_path / "6.1.toml"
    expected.write(path, reasons, "6.1")
    assert expected.read(path) == reasons
    assert expected.read(tmp_path / "none.toml") == set()


def test_differences_name_the_line_to_add_and_the_line_to_remove() -> None:
    path = expected.file_of("6.1")
    found = {"old reason": ["t::a"], 'new "reason"': ["t::b", "t::c"]}
    assert expected.differences(path, {"old reason", 'new "reason"'}, found) == []
    add, remove = expected.differences(path, {"old reason", "gone"}, found)
    assert "2, t::b" in add
    assert add.endswith('add to tools/kernels/expected/6.1.toml:\n  "new \\"reason\\"",')
    assert remove.endswith('remove from tools/kernels/expected/6.1.toml:\n  "gone",')


def test_the_files_of_expected_skips_are_in_order() -> None:
    files = sorted(expected.FOLDER.glob("*.toml"))
    assert {"6.1.toml", "6.12.toml", "7.3.toml"} <= {path.name for path in files}
    for path in files:
        skips = tomllib.loads(path.read_text())["skips"]
        assert skips == sorted(set(skips)), path.name


# --- the command


def test_without_qemu_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/no/such/folder")
    assert main([]) == 3
    said = capsys.readouterr().err
    assert said.startswith("NOT RUN: qemu-system-x86_64 is not here: apt-get install ")
    assert said.count("\n") == 1


def test_what_is_no_kernel_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["newest"])
    assert "6.1, 6.12, stable, 7.3" in capsys.readouterr().err
