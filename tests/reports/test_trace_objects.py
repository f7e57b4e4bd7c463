"""Which objects a report on a trace shows, what they are called, and what is said of them."""

from __future__ import annotations

import pytest

from support.traces import MS, PAGE, TraceMaker, matmul, paged, stencil, temporaries, walk
from userfault._trace import EventKind
from userfault.errors import RangeError
from userfault.reports.traces._findings import facts_of, finding, headline
from userfault.reports.traces._objects import choose, groups
from userfault.reports.traces._words import format_share, ticks, wrap


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0 %"), (0.00001, "< 0.01 %"), (0.00021, "0.02 %"), (0.034, "3 %"), (0.99, "99 %"), (0.9912, "99.1 %"),
        (0.99999, "99.9 %"), (1, "100 %"), (1.01, "100 %"),
    ],
)  # fmt: skip
def test_a_share_is_never_rounded_to_all_or_nothing(share: float, text: str) -> None:
    assert format_share(share) == text


@pytest.mark.parametrize(
    ("most", "wanted", "places"),
    [(2.0, 4, [0, 0.5, 1, 1.5, 2]), (0.037, 4, [0, 0.01, 0.02, 0.03]), (0.0, 5, [0]), (950, 3, [0, 500])],
)
def test_ticks_are_round(most: float, wanted: int, places: list[float]) -> None:
    assert ticks(most, wanted) == places


def test_lines_do_not_break_before_a_unit() -> None:
    assert wrap("100 % read and written each 100 ms", 24) == ["100 % read and written", "each 100 ms"]
    assert wrap("written each 18 ms", 16) == ["written each", "18 ms"]


def test_titles_say_what_happened() -> None:
    assert headline(stencil(), groups(stencil())) == (
        "a and b: 100 % read and written each 100 ms; coefficients: 3 % read each 100 ms"
    )
    assert headline(matmul(), groups(matmul())) == (
        "B: 100 % read each 25 ms; A: 100 % read, about 3 % at a time; C: 100 % written, about 3 % at a time"
    )
    assert headline(walk(), groups(walk())).startswith(
        "edges: 23 % read, about 1 % at a time; visits: 35 % written"
    )
    said = headline(paged(), groups(paged()))
    assert said.startswith(
        "weights: 100 % loaded, 1.4 times each, 71 % of it ahead of demand, faults take 1."
    )


def test_a_title_names_a_few() -> None:
    make = TraceMaker()
    for number in range(30):
        make.sample(make.add(f"x{number}", 8 * PAGE), 0, 10, (0, 8, 0))
    trace = make.build(10)
    assert headline(trace, groups(trace)) == "x0, x1 and 28 others: 100 % read each 10 ms"


def test_what_is_not_known_is_not_said() -> None:
    make = TraceMaker()
    untold = make.add("untold", 8 * PAGE, method="rwp-async", tells_writes=False)
    writes = make.add("writes", 8 * PAGE, "writes")
    make.sample(make.add("idle", 8 * PAGE, "writes"), 0, 10)
    make.sample(make.add("cold", 8 * PAGE), 0, 10)
    make.add("brief", 8 * PAGE)
    make.add("unused", 8 * PAGE, "faults")
    make.sample(untold, 0, 10, (0, 4, 0))
    make.sample(writes, 0, 10, (0, 2, 1))
    trace = make.build(10)
    said = {group.label: finding(trace, group) for group in groups(trace)}
    assert said == {
        "untold": "50 % touched each 10 ms",
        "brief": "not looked at while it lived",
        "writes": "25 % written each 10 ms",
        "idle": "never written",
        "cold": "never touched",
        "unused": "never loaded",
    }


def test_intervals_count_by_their_length() -> None:
    make = TraceMaker()
    grid = make.add("grid", 4 * PAGE, "writes")
    for start in range(10):
        make.sample(grid, start, start + 1)
    make.sample(grid, 10, 500, (0, 4, 1))
    facts = facts_of(make.build(500), groups(make.build(500))[0])
    assert facts.active == pytest.approx(490 / 500)
    assert facts.every_ns == 490 * MS


def test_temporaries_of_a_loop_share_a_place() -> None:
    trace = temporaries(30)
    total, temporary = groups(trace)
    assert total.label == "total [bold]"
    assert temporary.label == "temporary ×30"
    assert temporary.lives(trace)[:2] == ((0.0, 0.018), (0.02, 0.038))
    assert temporary.lives(trace)[-1] == (0.58, 0.6)


def test_what_is_there_at_the_same_time_does_not() -> None:
    make = TraceMaker()
    make.add("own", 100 * PAGE, died_ns=5 * MS)
    make.add("own (2)", 104 * PAGE, born_ns=5 * MS, died_ns=9 * MS)  # about as large, afterwards
    make.add("own (3)", 100 * PAGE, born_ns=7 * MS, died_ns=9 * MS)  # too early
    make.add("own (4)", 300 * PAGE, born_ns=9 * MS)  # too large
    assert [group.label for group in groups(make.build(20))] == ["own ×2", "own (3)", "own (4)"]


def test_equal_names_are_told_apart() -> None:
    make = TraceMaker()
    for _ in range(2):
        make.add("x", PAGE)
    make.add("", PAGE)
    assert [group.label for group in groups(make.build(1))] == ["x #0", "x #1", "object 2"]


def test_objects_are_chosen_by_name_or_pattern() -> None:
    trace = stencil()
    assert [group.label for group in groups(trace, ["coefficients", "a"])] == ["a", "coefficients"]
    assert [group.label for group in groups(trace, ["co*"])] == ["coefficients"]
    with pytest.raises(RangeError, match="no object 'c'; it has 'a', 'b', 'coefficients'"):
        groups(trace, ["c"])
    odd = TraceMaker()
    odd.add("grid[0]", PAGE)
    assert len(groups(odd.build(1), ["grid[0]"])) == 1


def test_a_crowd_is_cut_to_those_in_which_most_happens() -> None:
    make = TraceMaker()
    busy = [make.add(f"busy{number}", 10 * PAGE) for number in range(20)]
    for number in range(20):
        make.add(f"quiet{number}", 3 * PAGE)
    make.add("large", 1000 * PAGE)
    for number, one in enumerate(busy):
        make.sample(one, 0, 10, (0, 1 + number % 10, 0))
    trace = make.build(10)
    choice = choose(trace, groups(trace), 12)
    assert next(group.label for group in choice.shown) == "busy4"
    assert len(choice.shown) == 12
    assert choice.crowded == 9
    assert (choice.quiet, choice.quiet_bytes) == (20, 60 * PAGE)
    # That nothing happened in most of the memory is worth a place.
    assert "large" in [group.label for group in choose(trace, groups(trace), 21).shown]
    asked = choose(trace, groups(trace, ["quiet*"]), 50, all_of_them=True)
    assert len(asked.shown) == 20


def test_loads_count_as_activity() -> None:
    make = TraceMaker()
    idle = make.add("idle", 8 * PAGE, "faults")
    paged_one = make.add("paged", 8 * PAGE, "faults")
    make.event(paged_one, 1, 3, EventKind.DEMAND, 0.5)
    trace = make.build(10)
    assert [group.label for group in choose(trace, groups(trace), 1).shown] == ["paged"]
    assert idle.name not in headline(trace, groups(trace)[1:])
