"""The order in which a run is written, synced, renamed and marked: what a crash of the node may not find otherwise."""

import os
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import pytest

from cpmpi.run import index as index_module
from cpmpi.run.folder import delete_run, start_index
from cpmpi.run.hdf5 import changed_file
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import publish_text
from cpmpi.run.writer import ShardWriter
from tests.runs import held, kv_of, make_run, make_spec, open_writers, outputs_of, write_document


class Event(NamedTuple):
    """A call to the system, and the name that its file had then."""

    what: str
    file: str


@pytest.fixture
def events(monkeypatch, tmp_path):
    """Every pwrite, fsync, rename, unlink and change of an attribute, in order; files by name, found by inode."""
    seen: list[Event] = []

    def name_of(descriptor: int) -> str:
        inode = os.fstat(descriptor).st_ino
        paths = [tmp_path, *tmp_path.rglob("*")]
        return next((str(path.relative_to(tmp_path)) for path in paths if path.stat().st_ino == inode), "..")

    def watch(name: str, what) -> None:
        real = getattr(os, name)

        def call(*args, **kwargs):
            seen.append(Event(name, what(*args)))
            return real(*args, **kwargs)

        monkeypatch.setattr(os, name, call)

    def within(path) -> str:
        return str(Path(path).relative_to(tmp_path))

    watch("pwrite", lambda descriptor, *_: name_of(descriptor))
    watch("fsync", lambda descriptor, *_: name_of(descriptor))
    watch("replace", lambda _, path, *__: within(path))
    watch("unlink", lambda path, *_: within(path))
    real_set = index_module.set_attribute

    def set_attribute(owner, name, value):
        seen.append(Event(name, owner.name))
        real_set(owner, name, value)

    monkeypatch.setattr(index_module, "set_attribute", set_attribute)
    return seen


def test_a_published_file_is_durable_before_it_has_its_name_and_its_folder_after(tmp_path, events):
    publish_text(tmp_path / "a.json", "{}")
    assert [event for event in events if event.what != "unlink"] == [
        ("fsync", "a.json.tmp"), ("replace", "a.json"), ("fsync", "."),
    ]  # fmt: skip


def test_a_laid_out_file_is_sealed_and_durable_before_it_has_its_name(tmp_path, events):
    index = start_index(tmp_path / "run", make_spec((5,), world=1))
    open_writers(tmp_path / "run", index)[0].close()
    for name in ("run/run.h5", "run/shards/rank-00000.h5"):
        mine = [event for event in events if event.file in (name, f"{name}.tmp") and event.what != "unlink"]
        assert mine[:3] == [("pwrite", f"{name}.tmp"), ("fsync", f"{name}.tmp"), ("replace", name)], name
        assert events[events.index(Event("replace", name)) + 1] == ("fsync", str(Path(name).parent))


def test_a_document_is_durable_before_it_is_marked(tmp_path, events, monkeypatch):
    index = start_index(tmp_path, make_spec((5, 4), world=1))
    writers = open_writers(tmp_path, index)
    on_disk: list[tuple[float, bool]] = []
    counted = os.fsync

    def look(descriptor: int) -> None:
        """What the file holds when it is synced, past what HDF5 keeps in memory."""
        counted(descriptor)
        if events[-1].file == "run.h5":
            copy = tmp_path / "copy"
            copy.write_bytes(RunPaths(tmp_path).index.read_bytes())
            with h5py.File(copy) as file:
                attributes = file["documents/000000"].attrs
                on_disk.append((float(attributes["nll"]), bool(attributes["complete"])))

    monkeypatch.setattr(os, "fsync", look)
    events.clear()
    write_document(index, writers, 0)
    for writer in writers:
        writer.close()
    shard = [i for i, event in enumerate(events) if event.file == "shards/rank-00000.h5"]
    assert events[shard[-1]].what == "fsync"
    assert {events[i].what for i in shard[:-1]} == {"pwrite"}
    assert [event for event in events[shard[-1] + 1 :] if event.what != "unlink"] == [
        *[("pwrite", "run.h5")] * 4, ("fsync", "run.h5"),
        *[(name, "/documents/000000") for name in ("nll", "perplexity", "failed", "outputs_xxh3", "result_xxh3")],
        ("fsync", "run.h5"), ("complete", "/documents/000000"), ("fsync", "run.h5"),
    ]  # fmt: skip
    nll = -outputs_of(0, 5)["logprobs"][1:].astype(np.float64).sum()
    assert on_disk == [
        pytest.approx((np.nan, False), nan_ok=True),
        (pytest.approx(nll), False),
        (pytest.approx(nll), True),
    ]


def test_a_layer_is_written_then_its_checksums_then_its_mark(tmp_path, events, monkeypatch):
    spec = make_spec((5,), world=1)
    index = start_index(tmp_path, spec)
    (path,) = [writer._path for writer in open_writers(tmp_path, index) if not writer.close()]
    offsets = []
    counted = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: (offsets.append((at, bytes(data)[:1])), counted(fd, data, at))[1]
    )
    with ShardWriter(path, index.spec, 0) as writer:
        writer.put(0, 1, *(x[held(spec.documents[0], 0)] for x in kv_of(0, 1, 5)))
        writer.sync()
        place = writer._shard.document(0)
    marker, table = place.layer_done_offset + 1, place.checksum_offset + 1 * len(place.blocks) * 16
    kv = {at for at, _ in offsets[1:-2]}
    assert offsets[0] == (marker, b"\0")
    assert offsets[-2][0] == table
    assert offsets[-1] == (marker, b"\1")
    assert kv >= {place.layers[1].key_offset, place.layers[1].value_offset}


def test_a_failure_and_the_end_are_durable(tmp_path, events):
    index = start_index(tmp_path, make_spec((5,), world=1, kv=None))
    events.clear()
    index.mark_failed(0, "it is not finite")
    assert [event.what for event in events] == [
        "nll", "perplexity", "failed", "outputs_xxh3", "result_xxh3", "fsync", "fsync",
    ]  # fmt: skip
    events.clear()
    index.finish()
    end = [event for event in events if event.what != "unlink"]
    assert end[:3] == [("fsync", "summary.csv.tmp"), ("replace", "summary.csv"), ("fsync", ".")]
    assert end[-2:] == [("complete", "/"), ("fsync", "run.h5")]


def test_a_run_is_deleted_from_its_index_on(tmp_path, events):
    make_run(tmp_path)
    RunPaths(tmp_path).report.mkdir()
    (RunPaths(tmp_path).report / "surprisal-000000.png").touch()
    events.clear()
    delete_run(tmp_path)
    assert events[:2] == [("replace", "run.h5.deleted"), ("fsync", ".")]
    assert events[-2:] == [("unlink", "run.h5.deleted"), ("fsync", ".")]
    rest = [event.what for event in events[2:-2]]
    assert rest == ["unlink"] * rest.count("unlink") + ["fsync"] * 3, "then ., report and shards"
    assert rest.count("unlink") == 5
    assert not RunPaths(tmp_path).contents()


def test_a_new_list_takes_its_place_before_old_shards_go(tmp_path, events):
    for writer in open_writers(tmp_path, start_index(tmp_path, make_spec((5,), world=1))):
        writer.close()
    events.clear()
    start_index(tmp_path, make_spec((5,), world=2))
    published = events.index(Event("replace", "run.h5"))
    assert events[published + 1] == ("fsync", ".")
    assert events.index(Event("unlink", "shards/rank-00000.h5")) > published + 1


def test_an_attribute_is_on_disk_when_its_file_is_closed(tmp_path):
    start_index(tmp_path, make_spec((5,), world=1, kv=None)).mark_failed(0, "reason")
    with changed_file(RunPaths(tmp_path).index) as file:
        assert file["documents/000000"].attrs["failed"] == b"reason"
