"""A job in which no rank goes on ends, and a line says who is the first behind; one that is slow goes on.

What ranks see of each other is played here; `tests.test_hang` stops real processes.
"""

import json
import re
import time
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from cpmpi.comm import hang, watchdog
from cpmpi.comm.flight import DISK, EVENTS, LARGE_BYTES, NOBODY, Flight
from cpmpi.comm.hang import Beats, Dump, State, first_behind, verdict
from cpmpi.comm.ranks import AgreedError
from cpmpi.comm.watchdog import CEILING_S, FACTOR, FLOOR_S, IDLE_S, LEARNED_WAITS, Limit, Peers, Watchdog
from cpmpi.engine.options import JobOptions
from cpmpi.errors import UserError
from cpmpi.jobs.hang import hang_facts, hang_text, last_hang

from .test_bad_input import call
from .test_exact import save_llama, shared_folder

NODES = ("n1", "n1", "n2")
LIMIT_S, RAN_S = 10.0, 1.0


def test_the_recorder_keeps_the_last_events_and_where_they_were():
    flight = Flight()
    flight.begin(3, "a", 8)
    flight.enter(5, rounds=4)
    flight.round = 2
    for _ in range(EVENTS):
        flight.note("attend", 1)
    with flight.waits("receive", 2, 99, over="received"):
        assert flight.waiting[:3] == ("receive", 2, 99)
    events = flight.events()
    assert [event.seq for event in events] == list(range(3, EVENTS + 3))
    assert events[-1]._replace(time_s=0) == (EVENTS + 2, 0, 3, 5, 2, "received", 2, 99)
    assert flight.waiting is None
    with pytest.raises(ZeroDivisionError), flight.waits("gather"):
        raise ZeroDivisionError
    assert flight.waiting is None
    assert flight.events()[-1].kind == "gather"


def test_what_is_allowed_is_learned_between_a_floor_and_a_ceiling(monkeypatch):
    flight, limit = Flight(), Limit(None)
    assert limit.of(flight) == FACTOR * 30
    clock = iter(np.arange(0, 1e6, 2.0))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(clock)))
    for _ in range(LEARNED_WAITS):
        with flight.waits("gather"):
            pass  # 2 s by this clock
    assert flight.longest_wait_s == 2.0
    assert limit.of(flight) == FLOOR_S
    flight.longest_wait_s = 7.0
    assert limit.of(flight) == FACTOR * 7
    with flight.waits("receive", 1, 8 * LARGE_BYTES):
        pass
    with flight.waits("receive", 1, 64 * LARGE_BYTES):  # eight times the bytes: eight times the time
        assert limit.of(flight) == FACTOR * 8 * 2
    flight.longest_wait_s = 1e4
    assert limit.of(flight) == CEILING_S
    assert Limit(5).of(flight) == 5
    with flight.waits(DISK):
        pass
    before, flight.longest_wait_s = flight.longest_wait_s, 0.0
    with flight.waits(DISK):  # says nothing of the others
        pass
    assert (before, flight.longest_wait_s) == (1e4, 0.0)


def test_signs_of_life_come_several_times_in_what_is_allowed():
    found = [watchdog.beat_seconds(*each) for each in ((60, 2), (3, 2), (600, 2), (60, 800), (60, 20_000))]
    assert found == [5, 0.25, 5, 8, 10]


@pytest.mark.parametrize("choice", ["0", "-1", "2.9", "nan", "inf", "soon", ""])
def test_nonsense_is_refused(choice):
    with pytest.raises(UserError, match=r"--hang-timeout .*choose auto, off, or seconds, 3 or more"):
        JobOptions(model="m", inputs=("a",), output="o", hang_timeout=choice)


class Play:
    """Ranks 1 and 2 as rank 0 sees them."""

    def __init__(self, log):
        log.mkdir()
        (log / "beats").mkdir()
        self.peers = Peers(Beats(log, "now", 0), NODES)
        self.beats = [Beats(log, "now", rank) for rank in range(3)]
        self.states = [State(rank=rank, node=node, pid=1) for rank, node in enumerate(NODES)]

    def tells(self, rank, **changes):
        state = self.states[rank]
        self.states[rank] = replace(state, beat=state.beat + 1, **changes)
        assert self.beats[rank].write(self.states[rank])

    def looks(self, awaited=NOBODY):
        return self.peers.look(RAN_S, LIMIT_S, awaited)


@pytest.fixture
def play(tmp_path):
    return Play(tmp_path / "log")


def test_a_rank_without_a_sign_of_life_is_a_hang_after_the_limit(play):
    play.tells(1, kind="agreement")
    play.tells(2)
    for awaited in (NOBODY, 2):
        play.peers.forget()
        found = []
        for _ in range(12):
            play.tells(1, seq=play.states[1].seq + 1)
            found.append(play.looks(awaited)[0])
        assert found == [False] * 10 + [True] * 2  # the first look has nothing to compare with
    before = play.peers.beats()
    play.tells(1)
    dumps = {0: Dump(state=STATES[0], events=(), stack=())}
    found = play.peers.states(dumps, before, 5.0)
    assert found[0] == STATES[0]
    assert found[1].silent_s is None, "it wrote nothing in time, but lives"
    assert found[2].silent_s >= LIMIT_S + 5


def test_a_busy_rank_is_no_hang_however_long_it_takes(play):
    play.tells(1, kind="receive", peer=2)
    play.tells(2, document=0, name="a", layer=3, layers=8)
    for _ in range(50):
        play.tells(1)
        play.tells(2)
        hangs, busy = play.looks(awaited=1)
        assert not hangs
        assert busy == "rank 2 on n2, which computes in document 'a', layer 4 of 8"
    play.tells(2, kind=DISK)
    assert play.looks() == (False, "rank 2 on n2, which waits for its disk in document 'a', layer 4 of 8")
    play.tells(2, kind="", idle_s=IDLE_S)  # it neither computes nor goes on
    for _ in range(12):
        play.tells(1)
        play.tells(2)
        found = play.looks()
    assert found == (True, "")


def test_ranks_that_wait_for_each_other_without_an_event_are_a_hang(play):
    found = []
    for i in range(25):
        play.tells(1, kind="receive", peer=2)
        play.tells(2, kind="receive", peer=1, seq=min(i, 12))  # goes on for a while
        found.append(play.looks()[0])
    assert found == [False] * 22 + [True] * 3


def test_a_rank_that_left_is_a_hang_at_once_and_one_of_another_start_is_not_heard(play, tmp_path):
    play.tells(1, kind="agreement")
    play.tells(2, left="no space")
    assert play.looks(awaited=2) == (True, "")
    assert play.looks() == (True, "")
    play.beats[2].start = "before"
    play.tells(2, left="")
    play.peers.forget()
    found = []
    for _ in range(12):
        play.tells(1, seq=play.states[1].seq + 1)
        play.tells(2)
        found.append(play.looks(awaited=2)[0])
    assert found == [False] * 10 + [True] * 2, "its signs of life are of another start"
    (tmp_path / "log" / "beats" / "rank-00002").write_bytes(b'{"start": "now", "ra')
    assert play.beats[0].read(2) is None


def test_time_in_which_the_watchdog_did_not_run_does_not_count(play, monkeypatch):
    """As after SIGSTOP and SIGCONT, or when the shared file system stood still."""
    monkeypatch.setattr(watchdog, "end_all", lambda: pytest.fail("an alarm"))
    flight = Flight()
    mine = Watchdog(flight, play.beats[0], NODES, Limit(LIMIT_S))
    times = iter([0.0, *(1000.0 * i for i in range(1, 7))])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(times, 1e5))
    ran = []
    monkeypatch.setattr(mine, "_hangs", lambda ran_s: ran.append(ran_s))
    monkeypatch.setattr(mine, "_beat", lambda: True)
    monkeypatch.setattr(mine._over, "wait", lambda _: len(ran) == 5)
    mine._watch()
    assert ran == [2 * mine.beat_s] * 5

    def fail(_: float) -> bool:
        ran.append(0.0)
        raise OSError("the disk is ill")

    monkeypatch.setattr(mine, "_hangs", fail)
    monkeypatch.setattr(mine._over, "wait", lambda _: len(ran) == 8)
    mine._watch()
    assert len(ran) == 8, "it goes on after an error of its own"


def test_a_rank_whose_own_signs_of_life_fail_accuses_nobody(play):
    """Its file system is ill: what it does not see of the others says nothing."""
    flight = Flight()
    mine = Watchdog(flight, play.beats[0], NODES, Limit(LIMIT_S))
    with flight.waits("agreement"):
        for heard, expected in ((False, False), (True, True)):
            mine._heard = heard
            mine._beat()
            assert any(mine._hangs(RAN_S) for _ in range(40)) == expected
    mine._heard = True
    with flight.waits("agreement"):  # it goes on: what was seen of the others before does not count
        play.tells(1, kind="agreement")
        play.tells(2, kind="agreement")
        found = []
        for i in range(24):
            if i == 9:
                flight.note("received")
            mine._beat()
            play.tells(1)
            play.tells(2)
            found.append(mine._hangs(RAN_S))
        assert found.index(True) == 9 + 10


STATES = (
    State(rank=0, node="n1", kind="receive", peer=1, n_bytes=2_000_000, document=1, name="b", layer=4, layers=8,
          round=1, rounds=4, seq=90),
    State(rank=1, node="n1", kind="receive", peer=2, n_bytes=2_000_000, document=1, name="b", layer=4, layers=8,
          round=1, rounds=4, seq=80),
    State(rank=2, node="n2", kind="send", peer=0, n_bytes=1_000, document=1, name="b", layer=4, layers=8,
          round=0, rounds=4, seq=70),
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "behind", "line"),
    [
        ({}, 2, "all ranks wait; the first behind is rank 2/3 on n2 in document 'b', layer 5 of 8, round 1 of 4, where "
         "it waits to send 1 kB to rank 0 on n1; "),
        ({1: {"silent_s": 70.0}}, 1, "rank 1/3 on n1 gives no sign of life, the last from document 'b', layer 5 of 8, "
         "round 2 of 4, where it waits to receive 2 MB from rank 2 on n2; "),
        ({1: {"silent_s": 70.0}, 2: {"silent_s": 70.0}}, 2, "rank 2/3 on n2 gives no sign of life, the last from "
         "document 'b', layer 5 of 8, round 1 of 4, where it waits to send 1 kB to rank 0 on n1; 1 more "
         "rank likewise; "),
        ({1: {"left": "no space left", "kind": ""}}, 1, "rank 1/3 on n1 has left the job (no space left) in document "
         "'b', layer 5 of 8, round 2 of 4; "),
        ({2: {"kind": "", "idle_s": 2000.0}}, 2, "rank 2/3 on n2 does not go on in document 'b', layer 5 of 8, round 1 "
         "of 4, where it computes without using its processor; "),
        ({0: {"passes": 9}, 1: {"passes": 8, "layer": 7}, 2: {"passes": 9}}, 1, "all ranks wait; the first behind is "
         "rank 1/3 on n1 in document 'b', layer 8 of 8, round 2 of 4, where it waits to receive 2 MB from rank 2 on "),
        ({0: {"document": -1, "layer": -1, "round": -1, "kind": "root"}}, 0, "all ranks wait; the first behind is rank "
         "0/3 on n1 in the time before the first document, where it waits for rank 0; "),
    ],
)  # fmt: skip
def test_the_line_names_the_first_rank_behind(change, behind, line):
    states = [replace(state, **change.get(state.rank, {})) for state in STATES]
    assert first_behind(states).rank == behind
    said = verdict(states, 0, 61.0)
    assert said.startswith(line)
    assert said.endswith(f"rank 0 has waited for 1 min 01 s in {states[0].where()}; the job ends, and the same "
                         "command goes on")  # fmt: skip


def test_inspect_reads_what_a_hang_left(tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(UserError, match="no job of this run was ended because it hung"):
        last_hang(run)
    earlier, folder = (run / "log" / f"hang-{start}" for start in ("20260101T000000-9", "20260101T000001-1"))
    for each in (earlier, folder):
        each.mkdir(parents=True)
    flight = Flight()
    flight.begin(1, "b", 8)
    flight.note("send", 1, 2000)
    Dump(state=STATES[0], events=tuple(flight.events()), stack=("File a.py\n  wait()",)).write(folder)
    states = [STATES[0], STATES[1], replace(STATES[2], silent_s=70.0)]
    assert call(["inspect", "--hang", str(run)], capsys)[0] == 0
    assert "no rank came to say" in hang_text(last_hang(run))
    hang.write_verdict(folder, "error: rank 2/3 on n2 \x1b[31m gives no sign of life", states)
    _, line, _, head, _, *rows = hang_text(last_hang(run)).split("\n")
    assert line == r"error: rank 2/3 on n2 \x1b[31m gives no sign of life"
    assert re.split(r"  +", head) == [
        "rank",
        "node",
        "document",
        "layer",
        "round",
        "event",
        "does",
        "since",
        "last events",
    ]
    at = ["b", "5/8", "2/4"]
    assert [re.split(r"  +", row) for row in rows] == [
        ["0", "n1", *at, "90", "waits to receive 2 MB from rank 1 on n1", "0.0 s", "send 2 kB (1), document"],
        ["1", "n1", *at, "80", "waits to receive 2 MB from rank 2 on n2", "0.0 s", "wrote nothing"],
        ["2", "n2", "b", "5/8", "1/4", "70",
         "no sign of life for 1 min 10 s; waits to send 1 kB to rank 0 on n1 before", "0.0 s", "wrote nothing"],
    ]  # fmt: skip
    facts = json.loads(json.dumps(hang_facts(last_hang(run))))
    assert facts["first_behind"] == 2
    assert [e["kind"] for e in facts["ranks"][0]["events"]] == ["document", "send"]
    Dump(state=replace(STATES[2], round=3), events=(), stack=("File a.py\n  wait()",)).write(folder)
    text = hang_text(last_hang(run))  # a stopped process went on for a moment when it was ended
    assert "4/4    70     no sign of life for 1 min 10 s" in text
    assert text.endswith("rank 2 stands at\nFile a.py\n  wait()")
    (folder / "verdict.json").write_text('{"line"')
    status, printed = call(["inspect", "--hang", str(run)], capsys)
    assert status == 1
    assert printed.startswith(f"error: {folder}/verdict.json: damaged (")


@pytest.mark.mpi(2)
def test_two_ranks_raise_one_alarm_and_write_down_what_they_did(tmp_path, monkeypatch):
    """Rank 1 stands still without a sign of life, then waits in vain, then leaves; and then it is only slow."""
    from mpi4py import MPI

    from cpmpi.comm.ranks import Ranks

    comm, folder = MPI.COMM_WORLD, shared_folder(tmp_path)
    said, ended = [], []
    monkeypatch.setattr(watchdog, "last_words", said.append)
    monkeypatch.setattr(watchdog, "see_to_launcher", lambda: None)
    monkeypatch.setattr(watchdog, "end_all", lambda: ended.append("all"))
    monkeypatch.setattr(Watchdog, "_follow", lambda self: (ended.append("followed"), self._dump()))

    def play(name, rank_1):
        said.clear(), ended.clear()
        ranks = Ranks(comm)
        ranks.flight.begin(0, name, 8)
        ranks.flight.enter(2, rounds=2)
        tell = []
        with watchdog.watched(ranks, folder / name, 3.0, tell.append) as dog:
            if comm.rank == 0:
                with ranks.flight.waits("receive", 1, 500):
                    until = time.monotonic() + 120
                    while not ended and time.monotonic() < until and not (name == "slow" and tell):
                        time.sleep(0.01)
            else:
                rank_1(ranks, dog)
            comm.Barrier()
        comm.Barrier()
        return tell

    def silent(ranks, dog):
        dog._over.set()

    def waits(ranks, dog):
        with ranks.flight.waits("receive", 0, 500):
            while not ended:
                time.sleep(0.01)

    for name, rank_1 in (("silent", silent), ("deadlock", waits)):
        play(name, rank_1)
        everyone = comm.allgather((list(said), list(dict.fromkeys(ended))))
        lines = [line for lines, _ in everyone for line in lines]
        assert len(lines) == 1, everyone
        if name == "silent":
            assert f"error: rank 1/2 on {watchdog.node_name()} gives no sign of life, the last from" in lines[0]
        else:
            node = watchdog.node_name()
            assert f"error: all ranks wait; the first behind is rank 0/2 on {node} in document 'deadlock', " in lines[0]
            assert f"waits to receive 500 bytes from rank 1 on {node}; " in lines[0]
            assert {"all", "followed"} == {what for _, whats in everyone for what in whats}
        found = hang.read_hang(hang.hangs(folder / name)[-1])
        assert found.line == lines[0]
        assert sorted(found.dumps) == ([0] if name == "silent" else [0, 1])
        assert [event.kind for event in found.dumps[0].events][:3] == ["document", "layer", "root"]
        comm.Barrier()
    told = play("slow", lambda ranks, dog: time.sleep(4.0))
    assert comm.allgather((said, ended)) == [([], [])] * 2
    assert bool(told) == (comm.rank == 0)
    assert not (folder / "slow" / "beats").exists()


@pytest.mark.mpi(2)
def test_a_job_tells_where_it_is(tmp_path, monkeypatch):
    """What the watchdogs of a real job see of it."""
    import cpmpi

    folder = shared_folder(tmp_path)
    from mpi4py import MPI

    if MPI.COMM_WORLD.rank == 0:
        save_llama(folder / "model", 2)
        np.save(folder / "a.npy", np.arange(60) % 300)
    MPI.COMM_WORLD.Barrier()
    flights = []
    begin = Flight.begin

    def note(self, *args):
        flights.append(self)
        begin(self, *args)

    monkeypatch.setattr(Flight, "begin", note)
    with cpmpi.prefill(
        model=folder / "model", inputs=folder / "a.npy", output=folder / "run", attention="ring", checkpoint=0,
        hang_timeout=30,
    ):  # fmt: skip
        pass
    (flight,) = flights
    other = 1 - MPI.COMM_WORLD.rank
    events = [event for event in flight.events() if event.kind != "attend"]
    at = [(e.document, e.layer, e.round) for e in events if e.kind == "received"]
    assert at == [(0, 0, 0), (0, 1, 0)]
    assert {e.peer for e in events if e.kind in ("send", "sent", "receive", "received")} == {other}
    size = 30 * 2 * 2 * 8 * 4  # tokens, keys and values, heads, dim, bytes
    assert {e.n_bytes for e in events if e.kind in ("send", "received")} == {size}
    kinds = [event.kind for event in events]
    assert {"root", "gather", "allgather", "agreement", "disk", "split", "open", "close"} <= set(kinds)
    assert flight.waiting is None
    assert not (folder / "run" / "log" / "beats").exists()


def test_one_rank_has_no_watchdog(tmp_path):
    from cpmpi.comm.ranks import Ranks

    class Alone:
        rank, size = 0, 1

    assert isinstance(watchdog.watched(Ranks(Alone()), tmp_path, None, print), nullcontext)


def test_a_rank_that_leaves_alone_says_why(play):
    for error, left in ((OSError("no space"), "no space"), (AgreedError("all of us"), None)):
        with pytest.raises(type(error)), Watchdog(Flight(), play.beats[1], NODES, Limit(LIMIT_S)):
            raise error
        found = play.beats[0].read(1)
        assert (found.left if found is not None else None) == left
