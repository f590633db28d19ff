"""Texts are appended to finished documents: the run is whole before and after, and at every moment between."""

from __future__ import annotations

import os
import shutil

import h5py
import numpy as np
import pytest

import cpmpi
from cpmpi.attention.grid import Grid
from cpmpi.errors import UserError
from cpmpi.run import growth
from cpmpi.run.folder import start_index
from cpmpi.run.growth import Found, Text
from cpmpi.run.index import NotFiniteError
from cpmpi.run.shard import create_shard
from cpmpi.run.verify import verify_run
from cpmpi.run.writer import ShardWriter
from tests.power_cut import cut_at

from .runs import HIDDEN, KV, kv_of, make_run, make_spec, outputs_of

LENGTHS = (50, 2, 7)


def seed_of(id: str) -> int:
    return 100 + sum(map(ord, id))


def text_of(document: int, id: str, n_tokens: int) -> Text:
    ids = np.random.default_rng(seed_of(id)).integers(0, 30000, n_tokens)
    return Text(document=document, id=id, token_ids=ids, source=f"{id}.jsonl:1")


def found_of(text: Text, digests) -> Found:
    random = np.random.default_rng(seed_of(text.id) + 1)
    logprobs = -random.exponential(2.0, len(text.token_ids)).astype(np.float32)
    hidden = random.standard_normal(HIDDEN).astype(np.float32)
    return Found(text=text, logprobs=logprobs, last_hidden=hidden, digests=digests)


def append(folder, *texts: Text, world: int = 3, segments: int = 2, grid: Grid | None = None, change=lambda x: x):
    """All ranks' part in appending texts, as the job does it."""
    growth.finish(folder)
    with cpmpi.open_run(folder) as run:
        spec = growth.grown(run, texts, world_size=world, segments=segments, grid=grid or Grid())
        growth.make_room(run, spec)
        paths = [create_shard(folder, spec, rank) for rank in range(world)]
        digests: dict[int, list[int]] = {text.document: [] for text in texts}
        for rank, path in enumerate(paths):
            with ShardWriter(path, spec, rank) as writer:
                for inside in spec.own():
                    text = next(text for text in texts if text.document == inside.document_index)
                    rows = [
                        position - inside.part.layout.start
                        for piece in inside.part.pieces(rank)
                        for position in range(*piece)
                    ]
                    for layer, shape in enumerate(KV.shapes):
                        heads = slice(*inside.part.heads(rank, shape.heads))
                        kv = kv_of(seed_of(text.id), layer, len(text.token_ids))
                        writer.put(inside.number, layer, *(x[rows, heads] for x in kv))
                    digests[text.document].append(writer.finish(inside.number))
        found = [change(found_of(text, digests[text.document])) for text in texts]
        growth.switch(run, spec, [path.stat().st_size for path in paths], found)


def check(folder, *texts: Text) -> None:
    """The run is whole, and its documents are as they were with these texts at their ends."""
    assert verify_run(folder).problems == []
    with cpmpi.open_run(folder) as run:
        for i, n in enumerate(LENGTHS):
            document, mine = run.documents[i], [text for text in texts if text.document == i]
            outputs = outputs_of(i, n)
            found = [found_of(text, ()) for text in mine]
            expected = np.concatenate([outputs["logprobs"], *(one.logprobs for one in found)])
            np.testing.assert_array_equal(document.logprobs, expected)
            ids = np.concatenate([outputs["token_ids"], *(text.token_ids for text in mine)])
            np.testing.assert_array_equal(document.token_ids, ids)
            np.testing.assert_array_equal(
                document.last_hidden, found[-1].last_hidden if found else outputs["last_hidden"]
            )
            assert document.nll == pytest.approx(-np.sum(expected[1:], dtype=np.float64), rel=1e-12)
            assert [part.id for part in document.appended] == [text.id for text in mine]
            for layer in range(KV.layers):
                wholes = zip(
                    kv_of(i, layer, n), *(kv_of(seed_of(t.id), layer, len(t.token_ids)) for t in mine), strict=True
                )
                for got, parts in zip(document.kv(layer, as_torch=True), wholes, strict=True):
                    assert got.equal(_join(parts))
                first, last = n - 1, min(document.n_tokens, n + 3)  # across the seam
                part, whole = document.kv(layer, first, last, raw=True), document.kv(layer, raw=True)
                assert all(np.array_equal(a, b[first:last]) for a, b in zip(part, whole, strict=True))


def _join(parts):
    import torch

    return torch.cat(parts).bfloat16()


def test_texts_are_appended_by_any_ranks_one_after_the_other(tmp_path):
    """By 1 rank, then 4, then 2 that share the heads; h5py alone sees the whole."""
    make_run(tmp_path, make_spec(LENGTHS))
    shards = {path: path.read_bytes() for path in (tmp_path / "shards").iterdir()}
    first, second, third = text_of(0, "a", 9), text_of(0, "b", 30), text_of(2, "c", 1)
    append(tmp_path, first, world=1)
    check(tmp_path, first)
    append(tmp_path, second, third, world=4, segments=3)
    check(tmp_path, first, second, third)
    fourth = text_of(0, "d", 11)
    append(tmp_path, fourth, world=2, grid=Grid(tp=2, head_groups=2))
    check(tmp_path, first, second, third, fourth)
    assert {path: path.read_bytes() for path in (tmp_path / "shards").glob("*.h5")} == shards
    sizes = [path.stat().st_size for path in (tmp_path / "shards" / "000002").iterdir()]
    assert len(sizes) == 4
    with h5py.File(tmp_path / "run.h5") as file, cpmpi.open_run(tmp_path) as run:
        assert file.attrs["complete"]
        shown = file["documents/000000/kv/key"][2]
        np.testing.assert_array_equal(shown, run.documents[0].kv(2)[0])
        assert {**file["documents/000000/appended/000002"].attrs}["shard_set"] == 2
    assert "100" in (tmp_path / "summary.csv").read_text(), "50 + 9 + 30 + 11 tokens"


PLACES = [
    ("cpmpi.run.shard", "_lay_out", 2), ("os", "replace", 1), ("os", "replace", 2), ("os", "pwrite", 7),
    ("os", "pwrite", 40), ("os", "fsync", 3), ("os", "fsync", 9), ("cpmpi.run.growth", "checked_results", 1),
    ("cpmpi.run.index_layout", "_put_results", 2), ("cpmpi.run.hdf5", "write_seal", 4), ("os", "replace", 4),
    ("os", "replace", 5), ("cpmpi.run.index", "publish_text", 1), ("cpmpi.run.index", "set_attribute", 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("growth") / "run"
    make_run(folder, make_spec(LENGTHS))
    return folder


@pytest.mark.parametrize(("module", "name", "call"), PLACES)
def test_a_kill_at_any_place_leaves_the_old_run_or_the_new_one(whole_run, tmp_path, monkeypatch, module, name, call):
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    text = text_of(0, "a", 20)
    with cut_at(monkeypatch, f"{module}.{name}", call):
        append(folder, text)
    with cpmpi.open_run(folder) as run:
        there = growth.is_there(run.documents[0], text)
        whole = run.complete
        assert run.documents[0].n_tokens == 50 + 20 * there
    problems = verify_run(folder).problems
    if there and not whole:  # killed after the switch, before the run was marked as complete again
        assert [problem.partition(": ")[2] for problem in problems] == ["not complete: 3 of 3 documents are finished"]
    else:
        assert problems == []
        check(folder, *[text] * there)
    growth.finish(folder)
    if not there:
        append(folder, text)
    check(folder, text)
    assert {path.name for path in folder.iterdir()} == {"run.h5", "shards", "summary.csv"}


def test_the_switch_comes_after_all_is_on_disk(whole_run, tmp_path, monkeypatch):
    """Every new file and the folders of their names are synced before run.h5 is replaced."""
    folder = tmp_path / "run"
    shutil.copytree(whole_run, folder)
    events: list[tuple[str, str]] = []
    fsync, pwrite, replace = os.fsync, os.pwrite, os.replace

    def path_of(descriptor: int) -> str:
        return os.path.relpath(os.readlink(f"/proc/self/fd/{descriptor}"), folder)

    def note(kind, real):
        def call(descriptor, *rest):
            events.append((kind, path_of(descriptor)))
            return real(descriptor, *rest)

        return call

    def note_replace(old, new):
        events.append(("replace", os.path.relpath(new, folder)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note("fsync", fsync))
    monkeypatch.setattr(os, "pwrite", note("pwrite", pwrite))
    monkeypatch.setattr(os, "replace", note_replace)
    append(folder, text_of(0, "a", 20), text_of(1, "b", 3))
    at = events.index(("replace", "run.h5"))
    before = events[:at]
    for rank in range(3):
        name = f"shards/000001/rank-{rank:05d}.h5"
        places = [i for i, event in enumerate(before) if event == ("pwrite", name)]
        assert len(places) > 6
        assert ("fsync", name) in before[places[-1] :], "written and not synced"
        assert ("pwrite", name) not in events[at:]
    named = [i for i, event in enumerate(before) if event[0] == "replace"]
    assert ("fsync", "shards/000001") in before[named[-1] :]
    assert ("fsync", "run.h5.tmp") in before
    assert ("fsync", "shards") in before
    assert ("fsync", ".") in events[at:]


def test_what_a_killed_job_of_more_ranks_left_behind_is_deleted(tmp_path):
    make_run(tmp_path, make_spec(LENGTHS))
    text = text_of(0, "a", 9)
    with cpmpi.open_run(tmp_path) as run:
        spec = growth.grown(run, [text], world_size=5, segments=2, grid=Grid())
        for rank in range(5):
            create_shard(tmp_path, spec, rank)
    append(tmp_path, text, world=2)
    check(tmp_path, text)
    assert len(list((tmp_path / "shards" / "000001").iterdir())) == 2


def test_what_is_asked_for_by_its_first_tokens_stays(tmp_path):
    """The list that the run was made with finds its documents finished, also those that grew; by other ranks too."""
    make_run(tmp_path, make_spec(LENGTHS))
    text = text_of(0, "a", 9)
    append(tmp_path, text)
    assert start_index(tmp_path, make_spec(LENGTHS)).finished == {0, 1, 2}
    check(tmp_path, text)
    index = start_index(tmp_path, make_spec((*LENGTHS, 4), world=2))
    assert index.finished == {0, 1, 2}
    make_run(tmp_path, make_spec((*LENGTHS, 4), world=2))
    check(tmp_path, text)
    with cpmpi.open_run(tmp_path) as run:
        assert len(run.documents) == 4
        assert run.documents[0].appended[0].id == "a"
    make_run(tmp_path, make_spec(LENGTHS[1:], documents=make_spec(LENGTHS).documents[1:]))  # set aside, and back
    with cpmpi.open_run(tmp_path) as run:
        assert [document.n_tokens for document in run.set_aside] == [59, 4]
    assert verify_run(tmp_path).problems == []
    make_run(tmp_path, make_spec(LENGTHS))
    check(tmp_path, text)


def test_a_document_that_failed_keeps_its_reason(tmp_path):
    index = start_index(tmp_path, make_spec(LENGTHS))
    spec = index.spec
    make_run(tmp_path, spec, stop_after=2)
    index = start_index(tmp_path, make_spec(LENGTHS))
    index.mark_failed(2, "bad luck")
    with cpmpi.open_run(tmp_path) as run:
        assert not run.complete
    append(tmp_path, text_of(1, "a", 5))
    with cpmpi.open_run(tmp_path) as run:
        assert run.complete
        assert [document.failed for document in run.documents] == ["", "", "bad luck"]
        assert run.documents[1].n_tokens == 7


def test_what_cannot_be_appended(tmp_path):
    make_run(tmp_path, make_spec(LENGTHS), stop_after=1)
    with pytest.raises(UserError, match=r"2 of 3 documents are not finished \('d1' is the first\)"):
        append(tmp_path, text_of(0, "a", 5))
    make_run(tmp_path, make_spec(LENGTHS))

    def spoil(found: Found) -> Found:
        found.logprobs[3] = np.nan
        return found

    with pytest.raises(NotFiniteError, match="1 log-probabilities are not finite, the first at token 53"):
        append(tmp_path, text_of(0, "a", 5), change=spoil)
    check(tmp_path)
    append(tmp_path, text_of(0, "a", 5))
    with cpmpi.open_run(tmp_path) as run, pytest.raises(UserError, match="another text was appended to 'd0' as 'a'"):
        growth.is_there(run.documents[0], text_of(0, "a", 6))


def test_damage_in_what_was_appended_is_named(tmp_path):
    make_run(tmp_path, make_spec(LENGTHS))
    append(tmp_path, text_of(0, "a", 20))
    shard = tmp_path / "shards" / "000001" / "rank-00001.h5"
    with cpmpi.open_run(tmp_path) as run:
        offset = run.shard(1, 1).document(0).layers[1].value_offset
    content = bytearray(shard.read_bytes())
    content[offset] ^= 4
    shard.write_bytes(content)
    (problem,) = verify_run(tmp_path).problems
    assert "000001/rank-00001.h5: document 'd0': layer 1: value of tokens" in problem
    with cpmpi.open_run(tmp_path) as run:
        run.documents[0].kv(1, 0, 50)
        with pytest.raises(UserError, match=r"layer 1: value of tokens 5\d to"):
            run.documents[0].kv(1)
    shard.unlink()
    assert any("000001/rank-00001.h5: no such file" in problem for problem in verify_run(tmp_path).problems)
