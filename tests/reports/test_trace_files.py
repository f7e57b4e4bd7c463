"""Reports on traces as files: numbers, pages, pictures."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.traces import PAGE, TraceMaker, matmul, nothing, paged, stencil, temporaries, walk
from userfault._trace import Trace
from userfault.reports.traces import canvas_of, heatmap, save, table, timeline, wss

DOM = Path(__file__).parent.parent / "support" / "page_dom.js"
REPORTS = {"heatmap": heatmap, "timeline": timeline, "wss": wss, "table": table}


def written(tmp_path: Path, trace: Trace, suffix: str, name: str = "heatmap") -> Path:
    path = tmp_path / f"{name}{suffix}"
    make: Any = REPORTS[name]
    save(make(trace, canvas_of(path)) if name == "heatmap" else make(trace), path)
    return path


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("make", [stencil, paged, nothing])
def test_json_is_valid(tmp_path: Path, make: Any, name: str) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    values = json.loads(written(tmp_path, make(), ".json", name).read_text(), parse_constant=refuse)
    assert values["report"] == name
    assert {panel["type"] for panel in values["panels"]} <= {"heatmap", "chart", "bars", "table"}


def test_json_has_the_bins_and_their_axes(tmp_path: Path) -> None:
    (panel,) = json.loads(written(tmp_path, matmul(32), ".json").read_text())["panels"]
    assert panel["seconds"] == 0.8
    assert panel["column_s"] == 0.8 / 200
    a, b, _ = panel["strips"]
    assert a["row_nbytes"] * len(a["heat"]) == a["nbytes"] == 512 * PAGE
    assert {value for line in b["heat"] for value in line} == {1.0}
    assert panel["hues"][b["hue"][0][0]] == "read"
    assert b["lives_s"] == [[0.0, 0.8]]


@pytest.mark.parametrize("name", REPORTS)
def test_a_page_needs_nothing_else(tmp_path: Path, name: str) -> None:
    text = written(tmp_path, paged(), ".html", name).read_text()
    assert text.startswith("<!DOCTYPE html>")
    assert "{{" not in text
    # Namespaces are names, not addresses.
    addresses = set(re.findall(r"https?://[^\"'\s<]+", text)) - {"http://www.w3.org/2000/svg"}
    assert addresses == set()
    assert not re.search(r"""(?:src|href)\s*=|@import|url\(|fetch\(|import\(""", text)
    assert "prefers-color-scheme: dark" in text


def test_a_page_of_a_long_trace_stays_small(tmp_path: Path) -> None:
    make = TraceMaker()
    grid = make.add("grid", 65536 * PAGE, "writes")
    random = np.random.default_rng(1)
    for number in range(2000):
        first = np.unique(random.integers(0, 32768, 20) * 2)
        make.sample(grid, number, number + 1, *((int(page), 1, 1) for page in first))
    assert written(tmp_path, make.build(2000), ".html").stat().st_size < 1 << 20


def test_names_cannot_break_a_page(tmp_path: Path) -> None:
    make = TraceMaker()
    evil = make.add("</script><script>alert(1)//{{data}}", 8 * PAGE)
    make.sample(evil, 0, 10, (0, 8, 1))
    text = written(tmp_path, make.build(10, about={"command": "<b>&"}), ".html").read_text()
    assert "<script>alert" not in text
    assert text.count("</script>") == 2
    assert "&lt;b&gt;&amp;" in text


def drawn(page: Path, scheme: str = "light") -> dict[str, Any]:
    """Run the page's script in Node, with as much of a browser as it needs."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("there is no node: the script of a page is not run")
    done = subprocess.run([node, DOM, page, scheme], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("make", [stencil, walk, paged, temporaries, nothing])
def test_the_script_of_a_page_runs(tmp_path: Path, make: Any, name: str) -> None:
    drawn(written(tmp_path, make(), ".html", name))


@pytest.mark.parametrize(("scheme", "darker"), [("light", False), ("dark", True)])
def test_what_a_page_tells_under_the_pointer(tmp_path: Path, scheme: str, darker: bool) -> None:
    found = drawn(written(tmp_path, matmul(32), ".html"), scheme)
    a, b, c = found["tips"]
    first, middle, _ = a
    assert first.splitlines()[0] == "A"
    assert first.splitlines()[-1].endswith(" read")
    assert middle.splitlines()[1].startswith("1 MiB to 1.0")
    assert "rows 256 to " in middle
    assert middle.splitlines()[2].startswith("400 ms to 40")
    assert b[1].splitlines()[-1] == "100 % read"
    assert c[2].splitlines()[-1] == "not touched" or c[2].splitlines()[-1].endswith("written")
    assert [image["height"] for image in found["images"]] == [160, 160, 160]
    red, green, blue, opaque = found["images"][1]["corner"]
    assert opaque == 255
    assert blue > red
    assert (red + green + blue > 400) == darker


def test_a_page_draws_lines_areas_and_histograms(tmp_path: Path) -> None:
    found = drawn(written(tmp_path, paged(), ".html", "timeline"))
    # 3 + 3 + 1 + 3 series, and two rectangles for each bar besides those of the four charts.
    assert found["tags"]["path"] == 10
    assert found["tags"]["rect"] == 4 + 2 * 16
    loads = found["tips"][0]
    assert "217 readahead: " in loads[1]


def test_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"x\.bmp: a report ends in \.png, \.svg, \.pdf, \.html, \.json"):
        save(table(stencil()), tmp_path / "x.bmp")
    assert list(tmp_path.iterdir()) == []
