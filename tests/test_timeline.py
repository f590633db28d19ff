"""Timelines: intervals, the browser's trace, and the drawing."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from cpmpi.cost.choose import schedule_on
from cpmpi.cost.price import price
from cpmpi.cost.rates import Rates
from cpmpi.cost.shape import AttentionShape
from cpmpi.errors import UserError
from cpmpi.timeline.files import check_files, save_files
from cpmpi.timeline.intervals import Interval, Recorder, chrome_trace, save_trace, waiting_share
from cpmpi.timeline.plot import draw_timeline
from cpmpi.topology.synthetic import synthetic


@pytest.fixture(scope="module")
def intervals():
    topology = synthetic("nodes=2,gpus=4")
    shape = AttentionShape(new=8192, query_heads=8, kv_heads=8, key_dim=64, value_dim=64)
    rates = Rates(attention_flops=1e14, memory_gb_per_s=2000)
    return price(schedule_on("ring", topology), topology, shape, rates).intervals


def test_a_ranks_own_time_has_no_gaps(intervals):
    """Computing, merging and waiting follow each other without a gap, from the start to the rank's end."""
    for rank in range(8):
        own = sorted(
            (i for i in intervals if i.rank == rank and i.what in ("compute", "merge", "wait")), key=lambda i: i.start_s
        )
        assert own[0].start_s == 0
        for before, after in pairwise(own):
            assert after.start_s == pytest.approx(before.stop_s)


def test_waiting_share():
    some = [
        Interval(rank=0, what="compute", start_s=0, stop_s=3),
        Interval(rank=0, what="wait", start_s=3, stop_s=4),
        Interval(rank=1, what="compute", start_s=0, stop_s=4),
    ]
    assert waiting_share(some) == pytest.approx(1 / 8)
    assert waiting_share([]) == 0


def test_the_trace_holds_every_interval_in_microseconds(intervals, tmp_path):
    events = json.loads(chrome_trace(intervals))["traceEvents"]
    shown = [event for event in events if event["ph"] == "X"]
    assert len(shown) == len(intervals)
    assert {event["name"] for event in events if event["ph"] == "M"} == {"process_name", "thread_name"}
    longest = max(intervals, key=lambda i: i.stop_s)
    assert max(event["ts"] + event["dur"] for event in shown) == pytest.approx(longest.stop_s * 1e6, abs=0.01)
    arriving = [event for event in shown if event["name"] == "transfer"]
    assert arriving
    assert all(event["args"]["bytes"] > 0 and event["args"]["from"] in range(8) for event in arriving)
    save_trace(intervals, tmp_path / "trace.json")
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"] == events


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_the_drawing(intervals, tmp_path, suffix):
    draw_timeline(intervals, tmp_path / f"a.{suffix}", title="a ring")
    assert (tmp_path / f"a.{suffix}").stat().st_size > 5000


def test_a_drawing_of_many_ranks_shows_some(tmp_path):
    many = [Interval(rank=r, what="io", start_s=0, stop_s=1 + r, layer=2, n_bytes=5) for r in range(500)]
    draw_timeline(many, tmp_path / "many.svg", title="many")
    text = (tmp_path / "many.svg").read_text()
    assert "499" not in text or "468" in text


def test_what_is_not_drawn(intervals, tmp_path):
    with pytest.raises(ValueError, match=r"a drawing's name ends in one of .png, .svg, .pdf"):
        draw_timeline(intervals, tmp_path / "a.bmp", title="")
    with pytest.raises(ValueError, match="without intervals"):
        draw_timeline([], tmp_path / "a.png", title="")
    with pytest.raises(ValueError, match=r"unknown activity 'sleep': choose one of layers, compute, merge, wait"):
        Interval(rank=0, what="sleep", start_s=0, stop_s=1)
    with pytest.raises(ValueError, match="before it starts"):
        Interval(rank=0, what="wait", start_s=1, stop_s=0)


def test_files_that_could_not_be_written_are_refused_before_any_work(tmp_path):
    """By the name of the option, whichever command asks."""
    (tmp_path / "run").mkdir()
    (tmp_path / "folder.svg").mkdir()
    check_files(
        plot=tmp_path / "a.svg", trace=tmp_path / "a.json", json=tmp_path / "b.json", run_folder=tmp_path / "run"
    )
    check_files()
    for files, problem in (
        ({"trace": tmp_path / "none" / "a.json"}, r"^--trace \S+/none/a.json: no folder \S+/none$"),
        ({"json": tmp_path / "none" / "a.json"}, r"^--json \S+/none/a.json: no folder \S+/none$"),
        ({"plot": tmp_path / "folder.svg"}, r"^--plot \S+/folder.svg: is a folder; name a file$"),
        ({"plot": tmp_path / "a.gif"}, r"^--plot: \S+/a.gif: a drawing's name ends in one of .png, .svg, .pdf$"),
        ({"trace": tmp_path / "a.svg", "plot": tmp_path / "a.svg"}, r"^--trace \S+: --plot names the same file$"),
        ({"trace": tmp_path / "run" / "a.json", "run_folder": tmp_path / "run"}, r"^--trace \S+: is in the run folder"),
    ):
        with pytest.raises(UserError, match=problem):
            check_files(**files)


def test_what_the_file_system_refuses_is_one_line(tmp_path, intervals):
    with pytest.raises(UserError, match=r"No such file or directory: '\S+/none/a.json'"):
        save_files(intervals, plot=None, trace=tmp_path / "none" / "a.json", title="")


def test_a_recorder_counts_from_its_epoch():
    recorder = Recorder(rank=3, epoch_s=100.0, layer=7)
    recorder.note("transfer", 2, 101.0, 101.5, peer=1, n_bytes=64)
    (found,) = recorder.intervals
    assert found == Interval(rank=3, what="transfer", start_s=1.0, stop_s=1.5, round=2, layer=7, peer=1, n_bytes=64)
