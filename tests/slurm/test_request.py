"""Time limits and arrays as Slurm writes them, and requests that it would not understand."""

import pytest

from cpmpi.slurm.request import Array, BatchRequest, seconds_of, slurm_time


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 1800), ("5:30", 330), ("12:00:00", 43200), ("2-0", 172800), ("1-6:30", 109800), ("1-00:00:01", 86401),
        ("90m", 5400), ("12h", 43200), ("2d", 172800), ("150s", 150),
    ],
)  # fmt: skip
def test_time_limits(text, seconds):
    assert seconds_of(text) == seconds
    assert seconds_of(slurm_time(seconds)) == seconds


@pytest.mark.parametrize("text", ["", "soon", "1:60", "-5", "1h30", "1:2:3:4", "1:00:61"])
def test_what_is_no_time_limit(text):
    with pytest.raises(ValueError, match=r"not one; write minutes, H:MM:SS"):
        seconds_of(text)


@pytest.mark.parametrize(
    ("text", "indices", "again"),
    [("0-3", (0, 1, 2, 3), "0-3"), ("7,1-2", (1, 2, 7), "1-2,7"), ("0-10:5%2", (0, 5, 10), "0,5,10%2")],
)
def test_arrays(text, indices, again):
    array = Array.parse(text)
    assert (array.indices, str(array)) == (indices, again)


@pytest.mark.parametrize("text", ["", "a", "3-1", "1-", "0-9%", "0-9%0", "0-9:0", "1,,2"])
def test_what_is_no_array(text):
    with pytest.raises(ValueError, match=f"array '{text}'"):
        Array.parse(text)


def test_a_large_array_is_split_and_loses_no_index():
    parts = Array.parse("5-2500%8").split(1001)
    assert [(offset, str(array)) for offset, array in parts] == [
        (0, "5-1000%8"), (1001, "0-1000%8"), (2002, "0-498%8"),
    ]  # fmt: skip
    assert [offset + i for offset, array in parts for i in array.indices] == list(range(5, 2501))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"nodes": 0}, r"nodes \(0\) must be at least 1"),
        ({"cpus_per_task": -1}, r"cpus per task \(-1\) must be at least 1"),
        ({"memory": "lots"}, r"memory 'lots': not a size"),
        ({"signal_s": 70000}, r"signal seconds \(70000\)"),
        ({"time": "1"}, r"time limit 1 is no longer than the 120 s"),
        ({"partition": "a\nb"}, r"partition 'a\\nb': must be one line"),
        ({"setup": ("a\nb",)}, r"setup 'a\\nb': must be one line"),
    ],
)
def test_what_slurm_would_not_understand(values, told):
    with pytest.raises(ValueError, match=told):
        BatchRequest(**values)
