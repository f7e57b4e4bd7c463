"""The picture and its terminal sibling: they are drawn, and show what happened."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
from rich.console import Console

from reports import examples
from userfault.errors import MissingExtraError
from userfault.reports.heatmap import heatmap
from userfault.reports.picture import draw, figure

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'userfault[cli]'")


@pytest.fixture(scope="module", autouse=True)
def _fonts() -> None:
    """Matplotlib keeps the fonts of its first picture open: no test is to blame for that."""
    figure(examples.scan()).savefig(io.BytesIO())


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_chooses_the_format(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"blocks{suffix}"
    draw(examples.scan(), path)
    assert path.read_bytes().startswith(magic)


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"blocks\.bmp: a picture ends in \.png, \.svg, \.pdf"):
        draw(examples.scan(), tmp_path / "blocks.bmp")
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_is_to_be_seen() -> None:
    drawing = figure(examples.scan())
    blocks, memory = drawing.axes
    legend = blocks.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["poisoned (1)", "on demand (85)", "readahead (375)", "evicted (360)", "resident"]
    assert [text.get_text() for text in blocks.texts] == ["look-ups, 1 s", "scan, 2 s"]
    assert blocks.get_ylabel() == "offset in the array (MiB)"
    assert memory.get_xlabel() == "time (s)"
    assert "of 2.5 MiB" in memory.texts[0].get_text()


def test_nothing_happened() -> None:
    assert len(figure(examples.nothing()).axes) == 2


def test_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError) as caught:
        draw(examples.scan(), tmp_path / "blocks.png")
    assert str(caught.value) == "drawing a picture needs matplotlib: pip install 'userfault[cli]'"


def _lines(width: int, height: int) -> list[str]:
    output = io.StringIO()
    Console(file=output, width=width).print(heatmap(examples.scan(), width=width, height=height))
    return output.getvalue().splitlines()


def test_the_heat_map_fits_and_is_labelled() -> None:
    lines = _lines(60, 12)
    assert max(map(len, lines)) <= 60
    assert sum("▀" in line for line in lines) == 9
    assert lines[0].startswith("example 25 MiB ")
    assert lines[9].strip().startswith("0")
    assert lines[9].split() == ["0", "2", "s"]
    assert "on demand" in lines[10]
    assert "prefetch" not in lines[10]


def test_the_heat_map_shows_the_scan() -> None:
    text = heatmap(examples.scan(), width=60, height=23)
    styles = [(span.start, str(span.style)) for span in text.spans if "#0072b2" in str(span.style)]
    plain = text.plain
    columns = [start - plain.rfind("\n", 0, start) for start, _ in styles]
    # From top to bottom (low to high addresses) readahead moves to the right, on in time.
    assert columns[0] < columns[-1]
