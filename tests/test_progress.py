"""What a job says while it works and when it is done: on a terminal, in a log, and when it is told to stop."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from cpmpi.comm import progress as module
from cpmpi.comm.progress import Progress, end_line
from cpmpi.engine.results_table import results_text

from .conftest import clean_environment
from .test_exact import save_documents, save_llama

CLEAR = "\r\x1b[K"


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def terminal(monkeypatch):
    """A real terminal of 60 columns: a stream to write to, and what arrived."""
    monkeypatch.setenv("TERM", "xterm")
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    stream = os.fdopen(slave, "w", encoding="utf-8")

    def arrived() -> str:
        stream.flush()
        return os.read(master, 100_000).decode()

    yield stream, arrived
    end_line()
    stream.close()
    os.close(master)


def test_a_corpus_has_one_line_for_all(clock):
    stream = io.StringIO()
    progress = Progress(enabled=True, stream=stream)
    progress.job([100] * 3000)
    for i in range(3000):
        progress.start(f"d{i}", 100, 4)
        clock.now += 1 / 16
        progress.update(4)
        progress.done(100)
    progress.close()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 19, "187.5 s in steps of 10 s, and the end"
    assert lines[0] == "document 160 of 3,000:   5%  16,000 tokens  1,600 tokens/s  2 min 58 s left  (d159, layer 4/4)"
    assert lines[-1] == "3,000 documents, 300,000 tokens in 3 min 08 s, 1,600 tokens/s"
    clock.now += 10_000
    progress.update(1)
    clock.now += 400
    progress.update(2)
    assert len(stream.getvalue().splitlines()) == 21
    clock.now += 200
    progress.update(3)
    assert len(stream.getvalue().splitlines()) == 21, "fewer lines as the job gets long, one in five minutes at least"


def test_time_left_knows_what_long_documents_cost(clock):
    stream = io.StringIO()
    progress = Progress(enabled=True, stream=stream, interval_s=0)
    progress.job([1000, 3000], per_pair=0.002)  # costs 2000 and 12000
    progress.start("short", 1000, 2)
    clock.now = 20.0
    progress.update(2)
    progress.done(1000)
    progress.start("long", 3000, 2)
    clock.now = 80.0
    progress.update(1)
    first, second, third = stream.getvalue().splitlines()
    assert first == "document 1 of 2:  14%  1,000 tokens  50 tokens/s  2 min 00 s left  (short, layer 2/2)"
    assert " 14%  1,000 tokens " in second
    assert third == "document 2 of 2:  57%  2,500 tokens  31 tokens/s  1 min 00 s left  (long, layer 2/2)"
    progress.update(0.5)
    assert stream.getvalue().splitlines()[-1] == third, "it never goes back"


def test_one_document_is_told_by_its_layers(clock):
    stream = io.StringIO()
    progress = Progress(enabled=True, stream=stream, interval_s=0)
    progress.start("a\n\x1b[1m" + "b" * 100, 1000, 4)
    clock.now = 10.0
    progress.update(1.5)
    line = r"a\\n\\x1b\[1mb+\.\.\.b+:  38%  layer 2/4  1,000 tokens  38 tokens/s  17 s left\n"
    assert re.fullmatch(line, stream.getvalue())
    progress.done(1000)
    progress.close()
    assert len(stream.getvalue().splitlines()) == 2, "one document needs no sum"


def test_counts_come_now_and_then_and_the_last_always(clock):
    stream = io.StringIO()
    progress = Progress(enabled=True, stream=stream)
    for i in range(1, 3001):
        clock.now += 1 / 64
        progress.count("tokenized {done} of {of} characters", i * 7, 21_000)
    assert stream.getvalue().splitlines() == [
        "tokenized 4,480 of 21,000 characters",
        "tokenized 8,960 of 21,000 characters",
        "tokenized 13,440 of 21,000 characters",
        "tokenized 17,920 of 21,000 characters",
        "tokenized 21,000 of 21,000 characters",
    ]
    quiet = io.StringIO()
    progress = Progress(enabled=False, stream=quiet, interval_s=0)
    progress.job([1, 2])
    progress.start("x", 1, 1)
    progress.update(1)
    progress.count("{done} of {of}", 1, 1)
    progress.say("x")
    progress.close()
    assert not quiet.getvalue()


def test_the_live_line_fits_and_ends(clock, terminal):
    stream, arrived = terminal
    progress = Progress(enabled=True, stream=stream)
    assert progress.live
    progress.job([100, 100])
    progress.start("漢" * 80, 100, 4)
    clock.now = 1.0
    progress.update(1)
    shown = arrived()
    assert shown.startswith(f"{CLEAR}document 1 of 2:  12%  25 tokens  25 tokens/s  7.0 s left")
    assert "\n" not in shown
    assert sum(2 if c == "漢" else 1 for c in shown.removeprefix(CLEAR)) <= 59, "a line that wraps leaves its beginning"
    clock.now = 1.1
    progress.update(2)
    clock.now = 2.0
    progress.update(3)
    assert arrived().count(CLEAR) == 1, "five times a second at most"
    progress.say("a line that stays")
    assert arrived() == f"{CLEAR}a line that stays\r\n"
    progress.say("another")
    assert arrived() == "another\r\n", "no line stood there"
    clock.now = 3.0
    progress.update(4)
    assert arrived().startswith(CLEAR)
    end_line()  # as the command line does before an error
    end_line()
    assert arrived() == CLEAR
    progress.done(100)
    clock.now = 4.0
    progress.done(100)
    progress.close()
    assert re.search(rf"{re.escape(CLEAR)}2 documents, 200 tokens in 4\.0 s, 50 tokens/s\r\n$", arrived())


def test_a_job_on_a_terminal_leaves_no_half_line(tmp_path):
    """The whole command in a terminal: what is printed after progress begins a line of its own."""
    save_llama(tmp_path / "model", 2, layers=2)
    save_documents(tmp_path / "documents", tuple(range(60, 105)))
    line = [sys.executable, "-m", "cpmpi", "score", "--model", "model", "--input", "documents", "--output", "run"]
    master, slave = pty.openpty()
    job = subprocess.Popen(
        line, cwd=tmp_path, env=clean_environment(TERM="xterm"), stdin=slave, stdout=slave, stderr=slave, close_fds=True
    )
    os.close(slave)
    printed = b""
    while chunk := read(master):
        printed += chunk
    assert job.wait() == 0, printed
    lines = printed.decode().replace("\r\n", "\n").split("\n")
    shown = [text.rpartition(CLEAR)[2] for text in lines]  # what stands there in the end
    assert any(re.fullmatch(r"45 documents, 3,690 tokens in .*", text) for text in shown), lines
    assert any(re.match(r"document +tokens +nll", text) for text in shown), lines
    assert "... 25 documents between the most and the least surprising ..." in shown
    assert "45 documents; all of them are in summary.csv" in shown
    assert sum(text.startswith(("tokenized", "document ")) and "%" in text for text in shown) == 0, "a line that stayed"
    os.close(master)


def read(master: int) -> bytes:
    try:
        return os.read(master, 65536)
    except OSError:  # on Linux the end of a terminal
        return b""


def documents(n: int) -> list[SimpleNamespace]:
    """Documents of perplexity 1, 2, ..., not in that order."""
    order = np.random.default_rng(0).permutation(n) + 1
    return [SimpleNamespace(id=f"d{p}", n_tokens=10 * p, nll=float(p), perplexity=float(p)) for p in order.tolist()]


def test_results_of_many_documents_are_the_two_ends():
    few = results_text(documents(40), {0: 2.0})
    assert len(few.splitlines()) == 42
    assert few.count("(was done)") == 39
    many = documents(3000)
    many[5] = SimpleNamespace(id="one token", n_tokens=1, nll=0.0, perplexity=float("nan"))
    lines = results_text(many, dict.fromkeys(range(3000), 1.0)).splitlines()
    names = [line.split()[0] for line in lines[2:]]
    left = sorted((d.perplexity for d in many if d.perplexity == d.perplexity), reverse=True)
    assert names[:10] == [f"d{p:.0f}" for p in left[:10]]
    assert names[11:21] == [f"d{p:.0f}" for p in left[-10:]]
    assert lines[12] == "... 2,979 documents between the most and the least surprising ..."
    assert lines[23:] == ["3,000 documents; all of them are in summary.csv"]
    assert results_text(many, {1: 1.0}).endswith(
        "3,000 documents (2,999 of them done before); all of them are in summary.csv"
    )
    unknown = [SimpleNamespace(id=f"x{i}", n_tokens=1, nll=0.0, perplexity=float("nan")) for i in range(41)]
    assert "x0" not in results_text(unknown, {}), "nothing to rank"


def test_results_show_names_and_do_not_obey_them():
    named = [
        SimpleNamespace(id=name, n_tokens=5, nll=1.0, perplexity=2.0) for name in ("a\n\x1b[2J", "b" * 200_000, "漢字")
    ]
    _, _, first, second, third = results_text(named, {0: 1.0, 1: 1.0, 2: 1.0}).splitlines()
    assert first.startswith("a\\n\\x1b[2J  ")
    assert len(second) < 120
    assert "...b" in second
    assert len(first) == len(second) == len(third) + 2, "columns stay aligned, also beside wide characters"


def test_mpirun_that_is_told_to_stop_says_how_to_go_on(tmp_path):
    """Open MPI's launcher passes nothing on any more then: the line comes all the same, once."""
    save_llama(tmp_path / "model", 2, layers=2)
    save_documents(tmp_path / "documents", (200_000,))
    mpirun = next(
        p
        for p in (os.path.join(os.path.dirname(sys.executable), "mpirun"), "mpirun")
        if os.path.exists(p) or p == "mpirun"
    )
    line = [mpirun, "--oversubscribe", "--bind-to", "none", "-n", "2", sys.executable, "-m", "cpmpi", "score"]
    line += ["--model", "model", "--input", "documents", "--output", "run", "--allow-longer", "--attention", "ring"]
    log = tmp_path / "printed"
    with log.open("ab") as printed:
        job = subprocess.Popen(line, cwd=tmp_path, env=clean_environment(), stdout=printed, stderr=printed)
    for _ in count():
        if "weights read" in log.read_text() or job.poll() is not None:
            break
        time.sleep(0.05)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=120) != 0
    told = log.read_text()
    assert (
        told.count("told to stop (SIGTERM): the job stops where nothing is lost, and the same command goes on") == 1
    ), told
    assert "Traceback" not in told
