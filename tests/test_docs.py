"""The documentation is true: its Python runs, its links lead somewhere, every public name is in it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from support import run_python
from support.samples import write_samples

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md"]
# Fails the page's program, which runs apart from ours, if it does not end.
PAGE_SECONDS = 90.0


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, the rest of its fence, the number of its first line, its text."""

    language: str
    remark: str
    line: int
    text: str


def blocks(page: Path) -> Iterator[Block]:
    fence: tuple[str, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text().splitlines(), 1):
        mark = re.fullmatch(r"```(\w*) *(.*)", line)
        if mark and fence is None:
            fence, lines = (mark[1], mark[2].strip(), number + 1), []
        elif mark and fence is not None:
            yield Block(*fence, "\n".join(lines))
            fence = None
        else:
            lines.append(line)
    assert fence is None, f"{page.name}: the block of line {fence[2] - 1} does not end"


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    write_samples(folder)
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=lambda page: page.name)
def test_python_blocks_run(page: Path, samples: Path, tmp_path: Path) -> None:
    """Run the blocks of a page, in order, as one program beside sample files; the README's must need none."""
    folder = tmp_path / "beside"
    if page.name == "README.md":
        folder.mkdir()
    else:
        shutil.copytree(samples, folder)
    # Every line keeps its number, so that a traceback points into the page.
    program: list[str] = []
    for block in python_blocks(page):
        if block.remark.startswith("no-run:"):
            continue
        program += [""] * (block.line - 1 - len(program)) + block.text.splitlines()
    script = folder / f"{page.stem}.py"
    script.write_text("\n".join(program) + "\n")
    code = "import runpy, sys; sys.path.insert(0, ''); runpy.run_path(sys.argv[1], run_name='__main__')"
    run_python(code, PAGE_SECONDS, arguments=[script.name], cwd=folder).check()


UNRUN = [(page.name, block) for page in PAGES for block in python_blocks(page) if block.remark]


@pytest.mark.parametrize(("page", "block"), UNRUN, ids=[f"{page}:{block.line}" for page, block in UNRUN])
def test_blocks_that_do_not_run_say_why(page: str, block: Block) -> None:
    mark, _, reason = block.remark.partition(":")
    assert mark == "no-run", f"{page}:{block.line}: {block.remark!r} is not 'no-run: reason'"
    assert reason.strip(), f"{page}:{block.line}: no reason"
    compile(block.text, f"{page}:{block.line}", "exec")
    pytest.skip(f"{page}:{block.line} is not run: {reason.strip()}")


def public_modules() -> list[str]:
    import userfault

    return [
        "userfault",
        *(
            module.name
            for module in pkgutil.walk_packages(userfault.__path__, "userfault.")
            if not any(part.startswith("_") for part in module.name.split("."))
        ),
    ]


def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    documented = set(re.findall(r"`([A-Za-z_][\w.]*)", reference))
    # A name that two modules export is written once.
    documented |= {name.rpartition(".")[2] for name in documented}
    missing = []
    for name in public_modules():
        module = importlib.import_module(name)
        missing += [
            f"{name}.{attribute}"
            for attribute in getattr(module, "__all__", ())
            if attribute not in documented
        ]
    assert missing == []


def test_every_name_of_the_reference_exists() -> None:
    """Whatever is written as `userfault.something` is a name that can be imported."""
    reference = (ROOT / "docs" / "reference.md").read_text()
    gone = []
    for dotted in sorted(set(re.findall(r"`(userfault(?:\.\w+)+)", reference))):
        parts = dotted.split(".")
        thing: object = importlib.import_module(parts[0])
        for depth, part in enumerate(parts[1:], 2):
            if inspect.ismodule(thing) and not hasattr(thing, part):
                try:
                    thing = importlib.import_module(".".join(parts[:depth]))
                    continue
                except ImportError:
                    pass
            if not hasattr(thing, part) and part not in getattr(thing, "__annotations__", {}):
                gone.append(dotted)
                break
            thing = getattr(thing, part, None)
    assert gone == []


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"(https?|mailto):", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)
    assert dead == []


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
