"""Pictures of traces: few are drawn, as Matplotlib is slow to start."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from support.traces import PAGE, TraceMaker, paged, stencil, temporaries
from userfault.errors import MissingExtraError
from userfault.reports.traces import Canvas, heatmap, save, table, timeline, wss
from userfault.reports.traces._figure import figure

pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'userfault[cli]'")


@pytest.fixture(scope="module", autouse=True)
def _fonts() -> None:
    """Matplotlib keeps the fonts of its first picture open: no test is to blame for that."""
    figure(table(stencil()), width=800).savefig(io.BytesIO())


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_chooses_the_format(tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"run{suffix}"
    save(heatmap(stencil(), Canvas(100, 100, least=20)), path, width=700)
    assert path.read_bytes().startswith(magic)


def test_a_heat_map_is_labelled() -> None:
    drawing = figure(heatmap(temporaries(3), Canvas(300, 300, least=40)), width=1200)
    texts = [text.get_text() for text in drawing.texts]
    assert texts[0].startswith("temporary ×3: 100 % written each 18 ms")
    assert any(text.startswith("Recording took") for text in texts)
    (axes,) = drawing.axes
    labels = [text.get_text() for text in axes.texts]
    assert "total [bold]" in labels
    assert any("100 % written each 18 ms" in label for label in labels)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["1 %", "10 %", "100 % of a cell written"]
    assert len(axes.images) == 2


def test_labels_do_not_overlap_their_neighbours() -> None:
    drawing = figure(heatmap(paged(), Canvas(300, 16, least=16)), width=1200)
    (axes,) = drawing.axes
    # There is room for the name only.
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["weights"]


def test_time_lines_working_sets_and_tables_are_drawn() -> None:
    loads, others, resident, waits, bars = figure(timeline(paged()), width=1200).axes
    assert loads.get_ylabel() == "KiB"
    assert resident.get_ylabel() == "MiB"
    assert waits.get_ylabel() == "ms"
    assert bars.get_xscale() == "log"
    legend = others.get_legend()
    assert legend is not None
    assert next(text.get_text() for text in legend.get_texts()) == "32 written back"
    assert len(figure(wss(stencil()), width=1200).axes) == 4
    assert len(figure(table(stencil()), width=1200).axes) == 3


def test_dollars_and_underscores_in_names_are_letters() -> None:
    make = TraceMaker()
    for name in ("_private", "price $x_1$ and $"):
        make.sample(make.add(name, 8 * PAGE), 0, 10, (0, 8, 1))
    trace = make.build(10)
    drawing = figure(wss(trace), width=1200)
    drawing.savefig(io.BytesIO(), dpi=40)
    legend = drawing.axes[2].get_legend()
    assert legend is not None
    assert len(legend.get_texts()) == 2
    figure(heatmap(trace, Canvas(100, 100, least=20)), width=800).savefig(io.BytesIO(), dpi=40)


def test_matplotlib_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError) as caught:
        save(table(stencil()), tmp_path / "run.png")
    assert str(caught.value) == "drawing a picture needs matplotlib: pip install 'userfault[cli]'"
