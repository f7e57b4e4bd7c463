"""`userfault record`: which arrays it finds, what they are called, and what is told of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from support.cli import run_cli
from support.recording import LOOKS, pages_of, record, untold, write_program
from userfault.track import read_trace

pytestmark = pytest.mark.skipif(untold(), reason="this kernel does not tell which pages are written")


def test_arrays_have_the_names_of_their_variables_and_the_pages_that_were_written(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import numpy as np

class Model:
    def __init__(self):
        self.field = np.zeros((512, 1024), np.float64)

def solve(u):  # not the name: the outer frame's comes first
    for row in (3, 4, 5, 500):
        u[row] = 1
    wait(3)

def main():
    grid = np.zeros((1024, 512))
    small = np.zeros(1000)
    model = Model()
    layers = {"first": np.zeros(1 << 18), "second": None}
    wait(5)
    solve(grid)
    model.field[7] = 1
    layers["first"][:512] = 1
    wait(3)
    print("mean", grid.mean())

main()
""",
    )
    finished, summary, trace = record("--no-huge", path, folder=tmp_path)
    assert finished.returncode == 0
    assert finished.stdout.startswith("mean 0.0039")
    objects = {one.name: one for one in trace.objects}
    assert set(objects) == {"grid", "model.field", 'layers["first"]'}
    lines = Path(path).read_text().splitlines()
    for name, text in {"grid": "grid = ", "model.field": "model = ", 'layers["first"]': "layers = "}.items():
        (line,) = (number for number, found in enumerate(lines, 1) if text in found)
        assert objects[name].site == f"program.py:{line}"
    assert (objects["grid"].dtype, objects["grid"].shape) == ("<f8", (1024, 512))
    assert objects["grid"].granularity == 4096
    assert objects["grid"].born_ns < trace.duration_ns
    assert pages_of(trace, "grid") == {3, 4, 5, 500}
    assert pages_of(trace, "model.field") == {14, 15}
    assert pages_of(trace, 'layers["first"]') == {0}
    assert trace.complete
    assert trace.about["command"] == path
    assert summary["lost"] == 0
    assert {one["name"] for one in summary["objects"]} == set(objects)


def test_only_the_arrays_that_are_named(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import numpy as np
grid, new, other = (np.zeros(1 << 20) for _ in range(3))
class Thing: pass
thing = Thing()
thing.grid = np.zeros(1 << 20)
wait(6)
""",
    )
    _, _, trace = record("--only", "grid,ne?", path, folder=tmp_path)
    assert {one.name for one in trace.objects} == {"grid", "new", "thing.grid"}


def test_an_array_that_gets_a_variable_late_gets_its_name_then(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import numpy as np
deep = [[np.zeros((64, 8192), np.float32)]]
wait_for("unnamed 2 MiB")
array = deep[0][0]
wait_for("array")
array[0] = 1
wait(2)
""",
    )
    _, _, trace = record("--no-huge", path, folder=tmp_path)
    (found,) = trace.objects
    assert (found.name, found.dtype, found.shape) == ("array", "<f4", (64, 8192))
    assert found.site.startswith("program.py:")
    assert pages_of(trace, "array") == set(range(8))


def test_arrays_of_one_name_after_each_other_share_a_row(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import numpy as np
u = np.zeros(1 << 18)
for step in range(5):
    wait(4)
    u = u + 1
    u[0] = step
wait(4)
np.zeros(1 << 17)[:] = 0
kept = [[np.zeros(1 << 19)]]  # too deep for a name
wait(8)
""",
    )
    _, _, trace = record(path, folder=tmp_path)
    names = [one.name for one in trace.objects]
    assert set(names) <= {
        "u",
        "u (2)",
        "unnamed 4 MiB",
    }  # (2): where a look fell between the addition and the assignment
    assert {"u", "unnamed 4 MiB"} <= set(names)


def test_arrays_made_in_threads_before_the_recording_and_by_others(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import mmap, threading
import numpy as np
mapped = np.frombuffer(mmap.mmap(-1, 1 << 21), np.uint8)
def work():
    mine = np.zeros(1 << 19)
    wait(4)
    mine[0] = 1
    wait(2)
threads = [threading.Thread(target=work) for _ in range(2)]
[thread.start() for thread in threads]
wait(4)
mapped[8192] = 1
[thread.join() for thread in threads]
wait_for("mapped")
mapped[12288] = 1
wait(2)
""",
    )
    _, _, trace = record("--no-huge", path, folder=tmp_path)
    assert {one.name for one in trace.objects} == {"mapped", "mine", "mine (2)"}
    assert pages_of(trace, "mine") == pages_of(trace, "mine (2)") == {0}
    assert 3 in pages_of(trace, "mapped") <= {2, 3}


def test_paged_arrays_are_recorded_by_their_faults(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import numpy as np, userfault
np.save("data.npy", np.arange(1 << 20))
paged = userfault.open("data.npy")
wait_for("paged")
print(paged[::4096].sum())
wait(2)
""",
    )
    finished, _, trace = record(path, folder=tmp_path)
    assert finished.stdout.startswith(str(sum(range(0, 1 << 20, 4096))))
    assert trace.object("paged").watched == "faults"
    assert len(trace.events)


def test_a_model_of_which_the_program_holds_no_array_is_recorded(tmp_path: Path) -> None:
    header = json.dumps({
        f"layer{number}": {
            "dtype": "F32",
            "shape": [1 << 18],
            "data_offsets": [number << 20, (number + 1) << 20],
        }
        for number in range(4)
    }).encode()  # fmt: skip
    (tmp_path / "model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + np.ones(1 << 20, np.float32).tobytes()
    )
    path = write_program(
        tmp_path,
        LOOKS
        + """
import userfault
def run(weights):
    wait_for("model.safetensors")
    layer = weights["layer2"]
    wait(2)  # a tensor is not what the model is called after
    print(float(layer[::1024].sum()), recorder.names)
    wait(2)
run(userfault.open("model.safetensors"))
""",
    )
    finished, _, trace = record(path, folder=tmp_path)
    assert finished.stdout.splitlines()[0] == "256.0 ('model.safetensors',)"
    assert trace.object("model.safetensors").watched == "faults"
    assert len(trace.events)


def test_a_paged_array_that_gets_a_variable_late_gets_its_name_then(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import numpy as np, userfault
np.save("data.npy", np.arange(1 << 20))
hidden = [[userfault.open("data.npy")]]
wait_for("data.npy")
table = hidden[0][0]
wait_for("table")
print(table[::4096].sum())
""",
    )
    _, summary, trace = record(path, folder=tmp_path)
    assert [one["name"] for one in summary["objects"]] == ["table"]
    assert trace.object("table").shape == (1 << 20,)
    assert len(trace.events)


def test_crowds_of_temporaries_are_counted_and_take_no_memory(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        """
import resource
import numpy as np
a = np.ones(1 << 17)
for _ in range(3000):
    (a + 1) * 2
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
""",
    )
    finished, summary, trace = record(path, folder=tmp_path)
    assert int(finished.stdout.split()[0]) < 400 << 10  # KiB: they are 6 GiB in all
    assert len(trace.objects) < 10
    assert any("lived for less than a sample" in note for note in summary["notes"])


def test_where_numpy_cannot_be_asked_variables_are_looked_at(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import numpy as np
grid = np.zeros(1 << 20)
wait_for("grid")
""",
    )
    code = """
        from userfault import _allocations
        def start(*arguments):
            raise _allocations.HandlerError("NumPy is from the future")
        _allocations.start = start
        from userfault.cli import main
        main()
    """
    finished = run_cli("record", path, code=code, cwd=tmp_path)
    finished.check()
    assert "only arrays that variables hold were found: NumPy is from the future" in finished.stderr
    assert [one.name for one in read_trace(tmp_path / "program.uft").objects] == ["grid"]


def test_arrays_can_be_resized_while_they_are_looked_at(tmp_path: Path) -> None:
    path = write_program(
        tmp_path,
        LOOKS
        + """
import numpy as np
array = np.ones(1 << 18)
end, number = recorder.cost.samples + 200, 0
while recorder.cost.samples < end:
    number += 1
    array.resize((1 << 18) + number % 2 * 1024)  # refuses where somebody else has a reference
print("done")
""",
    )
    finished, _, _ = record(path, "--every", "0.002", "--budget", "100%", folder=tmp_path)
    assert finished.check().startswith("done")
