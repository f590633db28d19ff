"""The record of a run's jobs, the status file, and signals that set a flag."""

import json
import os
import signal
import threading

import pytest

from cpmpi.comm.stop import listening
from cpmpi.slurm import record


def test_lines_of_many_writers_do_not_mix(tmp_path):
    def write(writer):
        for i in range(50):
            record.note(tmp_path, job=str(writer), started=i, text="x" * 200)

    writers = [threading.Thread(target=write, args=(w,)) for w in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = record.entries(tmp_path)
    assert len(found) == 200
    assert [e["started"] for e in found if e["job"] == "2"] == list(range(50))


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path):
    record.note(tmp_path, job="1", submitted=1)
    with (tmp_path / record.JOBS).open("a") as file:
        file.write('{"job": "1", "sta')
    assert record.entries(tmp_path) == [{"job": "1", "submitted": 1}]
    assert record.entries(tmp_path / "nowhere") == []


@pytest.mark.parametrize(
    ("ends", "count"),
    [([], 0), ([("stopped", 0)], 1), ([("stopped", 0), ("stopped", 0)], 2), ([("stopped", 0), ("stopped", 1)], 0),
     ([("stopped", 2), ("stopped", 0)], 1), ([("stopped", 0), ("failed", 0)], 0),
     ([("stopped", 0), ("complete", 0)], 0)],
)  # fmt: skip
def test_starts_in_vain_are_the_last_ones_without_a_document(ends, count):
    lines = [{"job": "1", "submitted": 1}]
    for how, finished in ends:
        lines += [{"job": "1", "started": 1}, {"job": "1", "ended": 2, "how": how, "finished_here": finished}]
    assert record.starts_in_vain(lines) == count


def test_the_status_is_replaced_at_once_and_not_more_than_once_a_second(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    status = record.StatusFile(tmp_path)
    assert status.due()
    before = status.path
    status.write(layer=1)
    inode = before.stat().st_ino
    assert not status.due()
    now[0] += record.STATUS_INTERVAL_S
    assert status.due()
    status.write(layer=2)
    found = record.read_status(tmp_path)
    assert found is not None
    assert found["layer"] == 2
    assert before.stat().st_ino != inode, "written over in place"
    assert [p.name for p in tmp_path.iterdir()] == [record.STATUS]


def test_a_status_that_cannot_be_written_stops_nobody(tmp_path):
    record.StatusFile(tmp_path / "gone").write(layer=1)
    assert record.read_status(tmp_path / "gone") is None
    (tmp_path / record.STATUS).write_text(json.dumps([1]))
    assert record.read_status(tmp_path) is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_a_flag_and_no_more(number):
    before = signal.getsignal(number)
    with listening(9.0) as stop:
        assert (stop.asked, stop.left_s) == (False, float("inf"))
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == number
        assert 0 < stop.left_s <= 9.0
    assert signal.getsignal(number) == before


def test_outside_of_the_main_thread_nothing_is_caught():
    caught = []

    def work():
        with listening(9.0):
            caught.append(signal.getsignal(signal.SIGUSR1))

    before = signal.getsignal(signal.SIGUSR1)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert caught == [before]
