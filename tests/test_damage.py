"""Bits flip and files are cut off: nothing is silent, and every line names the file, the document and the layer."""

import random

import h5py
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from cpmpi import open_run
from cpmpi.errors import UserError
from cpmpi.jobs import inspect, verify
from cpmpi.run import layer_reader, seal, shard
from cpmpi.run import verify as verify_module
from cpmpi.run.hdf5 import changed_file, created_file, set_attribute
from cpmpi.run.paths import RunPaths
from cpmpi.run.results import Results, result_digest
from cpmpi.run.verify import verify_run
from tests.runs import kv_of, make_run, make_spec, outputs_of


def flip(path, offset: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    with open(path, "r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)[0]
        raw.seek(offset)
        raw.write(bytes([byte ^ 1 << bit]))


def said_of(folder) -> list[str]:
    """What `cpmpi verify` says, an error among it."""
    try:
        return verify_run(folder).problems
    except UserError as problem:
        return [str(problem)]


def test_no_flipped_bit_is_silent(tmp_path):
    """Any bit of run.h5, of the shards, and of the summary: 100 of them, others each time."""
    make_run(tmp_path)
    chance = random.Random(seed := random.randrange(1 << 32))
    files = [RunPaths(tmp_path).index, *(RunPaths(tmp_path).shard(rank) for rank in range(3))]
    for _ in range(100):
        path = chance.choice([*files, RunPaths(tmp_path).summary] if chance.random() < 0.2 else files)
        offset, bit = chance.randrange(path.stat().st_size), chance.randrange(8)
        flip(path, offset, bit)
        assert any(str(path) in problem for problem in said_of(tmp_path)), f"seed {seed}: {path}: {offset}, bit {bit}"
        flip(path, offset, bit)
    assert said_of(tmp_path) == []


def test_no_flipped_bit_is_silent_where_a_seal_does_not_look(tmp_path):
    """What is written later, but for the mark of a killed writer: every byte of it in a small run."""
    make_run(tmp_path, make_spec((3, 1), world=1))
    index = RunPaths(tmp_path).index
    raw = index.read_bytes()
    _, _, _, room, count = seal.HEADER.unpack(raw[: seal.HEADER.size])
    places = np.frombuffer(raw[seal.HEADER.size :], "<u8", 2 * count).reshape(-1, 2).tolist()
    marks = room + seal.WRITE_MARKS[0]
    assert [marks, marks + 4] in places
    offsets = [offset for start, stop in places if stop - start <= 64 for offset in range(start, stop)]
    assert len(offsets) > 150
    for offset in offsets:
        bit = random.randrange(8) if offset != marks else random.randrange(1, 8)
        flip(index, offset, bit)
        assert said_of(tmp_path), (offset, bit)
        flip(index, offset, bit)
    failed = next(start for start, stop in places if stop - start > 64)
    for offset in (failed, failed + 300, failed + 479):
        flip(index, offset)
        assert any(str(index) in problem for problem in said_of(tmp_path)), offset
        flip(index, offset)


@pytest.mark.parametrize("stop_after", [None, 1])
def test_every_command_ends_with_a_line(tmp_path, stop_after):
    """With a file cut off anywhere, or a bit flipped in its structure, also of a run under way."""
    make_run(tmp_path, stop_after=stop_after)
    for path in (RunPaths(tmp_path).index, RunPaths(tmp_path).shard(1)):
        whole = path.read_bytes()
        for length in (0, 5, 4096, 4100, random.randrange(len(whole)), len(whole) - 1):
            path.write_bytes(whole[:length])
            assert any(str(path) in problem for problem in said_of(tmp_path)), length
            with pytest.raises(UserError, match=path.name), open_run(tmp_path) as run:
                run.documents[0].kv(0)
            for command in (verify.command, inspect.command):
                result = CliRunner().invoke(command, [str(tmp_path)])
                assert result.exception is None or isinstance(result.exception, UserError | SystemExit)
                assert path.name in result.output + str(result.exception)
        path.write_bytes(whole)


def test_a_seal_that_is_damaged_itself(tmp_path):
    path = tmp_path / "a.h5"
    with created_file(path, most_places=1, attributes=["complete"]) as file:
        file.attrs["complete"] = False
        file.attrs["id"] = "x"
    whole = path.read_bytes()
    for offset in range(seal.HEADER.size + 33):
        for bit in (0, 7):
            flip(path, offset, bit)
            with pytest.raises(UserError, match=r"a\.h5: "):
                seal.check_seal(path)
            flip(path, offset, bit)
    assert path.read_bytes() == whole
    assert seal.check_seal(path)
    with h5py.File(tmp_path / "plain.h5", "w"):
        pass
    assert not seal.check_seal(tmp_path / "plain.h5"), "an HDF5 file without a seal"


def test_the_checksum_of_many_places_is_that_of_the_bytes_between_them(tmp_path):
    """Across the windows in which a file is read."""
    chance = np.random.default_rng(7)
    data = chance.integers(0, 256, 5 * seal.WINDOW_BYTES + 17, dtype=np.uint8)
    (tmp_path / "a").write_bytes(data.tobytes())
    bounds = sorted(chance.choice(np.arange(100, len(data)), 40, replace=False).tolist())
    places = list(zip(bounds[::2], bounds[1::2]))
    with open(tmp_path / "a", "rb") as raw:
        before = seal._checksum(raw.fileno(), len(data), places)
        kept = np.ones(len(data), np.bool_)
        for start, stop in [seal.CHECKSUM, *places]:
            kept[start:stop] = False
        assert before == seal.xxhash.xxh3_64_intdigest(data[kept].tobytes())


@pytest.fixture(scope="module")
def blocks_of_seven(tmp_path_factory):
    """A run with checksums of blocks of seven tokens, and the numbers of its ranks and segments."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard, "BLOCK_TOKENS", 7)
        make_run(folder, make_spec((50, 100), world=2, segments=2))
    return folder


@settings(max_examples=60, deadline=None)
@given(
    layer=st.integers(0, 2),
    start=st.one_of(st.none(), st.integers(-110, 110)),
    stop=st.one_of(st.none(), st.integers(-110, 110)),
    verify=st.booleans(),
)
def test_any_slice_of_many_blocks(blocks_of_seven, layer, start, stop, verify):
    with open_run(blocks_of_seven) as run, pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_reader, "CHUNK_BYTES", 50)
        found = run.documents[1].kv(layer, start, stop, as_torch=True, verify=verify)
        assert len(run.shard(0).document(1).blocks) == 8
        for got, whole in zip(found, kv_of(1, layer, 100)):
            assert got.equal(whole.bfloat16()[slice(start, stop)])


@pytest.mark.parametrize(("part", "name"), [(0, "key"), (1, "value")])
def test_reading_a_flipped_bit_is_an_error_that_names_it(tmp_path, monkeypatch, part, name):
    monkeypatch.setattr(shard, "BLOCK_TOKENS", 7)
    make_run(tmp_path, make_spec((50,), world=1, segments=1))
    with open_run(tmp_path) as run:
        place = run.shard(0).document(0).layers[1]
        row = 9
        offset = (place.key_offset, place.value_offset)[part] + row * 2 * (4, 3)[part] * 2
    flip(RunPaths(tmp_path).shard(0), offset)
    message = rf"shards/rank-00000\.h5: document 'd0': layer 1: {name} of tokens 7 to 13 does not have its checksum"
    with open_run(tmp_path) as run:
        document = run.documents[0]
        for span in ((), (0, 8), (13, 14), (12, 40)):
            with pytest.raises(UserError, match=message):
                document.kv(1, *span)
        document.kv(1, 0, 7)
        document.kv(1, 14, 50)
        document.kv(0)
        read = document.kv(1, as_torch=True, verify=False)[part].float().numpy()
        expected = kv_of(0, 1, 50)[part].bfloat16().float().numpy()
        assert np.flatnonzero((read != expected).any(axis=(1, 2))).tolist() == [row]
    monkeypatch.setattr(verify_module, "CHUNK_BYTES", 8)
    assert [problem.endswith("does not have its checksum") for problem in verify_run(tmp_path).problems] == [True]


@pytest.mark.parametrize("part", [0, 1])
def test_a_flipped_checksum_is_reported_by_reads_too(tmp_path, part):
    make_run(tmp_path)
    with open_run(tmp_path) as run:
        offset = run.shard(2).document(0).checksum_offset
    flip(RunPaths(tmp_path).shard(2), offset + 8 * part)
    message = "rank-00002.h5: document 'd0': its checksums are not those that run.h5 recorded"
    assert [problem.split("shards/")[1] for problem in verify_run(tmp_path).problems] == [message]
    with open_run(tmp_path) as run, pytest.raises(UserError, match=message):
        run.documents[0].kv(0)


def test_flipped_outputs_are_not_read(tmp_path):
    make_run(tmp_path)
    with open_run(tmp_path) as run:
        offset = run.documents[0].group["logprobs"].id.get_offset()
    flip(RunPaths(tmp_path).index, offset + 4)
    with open_run(tmp_path) as run:
        for name in ("logprobs", "token_ids", "last_hidden"):
            with pytest.raises(UserError, match=r"run\.h5: document 'd0': its outputs do not have the checksum"):
                getattr(run.documents[0], name)
        assert run.documents[0].nll > 0
    flip(RunPaths(tmp_path).index, offset + 4)
    with changed_file(RunPaths(tmp_path).index) as file:
        set_attribute(file["documents/000000"], "nll", 1.0)
    with open_run(tmp_path) as run, pytest.raises(UserError, match="d0': its results do not have the checksum"):
        run.documents[0].nll  # noqa: B018


def test_verify_reads_in_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(verify_module, "CHUNK_BYTES", 100)
    make_run(tmp_path, make_spec((50,), world=1, segments=1))
    assert verify_run(tmp_path).problems == []
    with open_run(tmp_path) as run:
        offset = run.shard(0).document(0).layers[0].key_offset
    flip(RunPaths(tmp_path).shard(0), offset + 150)
    assert len(verify_run(tmp_path).problems) == 1


def test_what_h5py_shows_is_opened_too(tmp_path, monkeypatch):
    """A map of the virtual dataset that is wrong in itself, under a seal and all."""
    from cpmpi.run import index_layout

    real = index_layout._virtual_blocks
    monkeypatch.setattr(index_layout, "_virtual_blocks", lambda *args: real(*args)[:-1])
    make_run(tmp_path, make_spec((50,), world=2))
    (problem,) = verify_run(tmp_path).problems
    assert "run.h5: document 'd0': the virtual dataset kv/key does not show token " in problem
    assert verify_run(tmp_path, quick=True).problems == []


def test_a_complete_run_with_an_incomplete_document(tmp_path):
    make_run(tmp_path)
    with changed_file(RunPaths(tmp_path).index) as file:
        set_attribute(file["documents/000001"], "complete", False)
    assert "damaged: the run is complete, but document 'd1' is not" in verify_run(tmp_path).problems[0]
    assert outputs_of(1, 2)["logprobs"][1] < 0


def test_every_result_is_under_the_checksum():
    arrays = {**outputs_of(0, 5), "kv/shard_digest": np.array([1, 2], "<u8")}
    good = Results(arrays=arrays, nll=1.0, perplexity=2.0)
    others = [
        Results(arrays={**arrays, "kv/shard_digest": np.array([1, 3], "<u8")}, nll=1.0, perplexity=2.0),
        Results(arrays={**arrays, "token_ids": arrays["token_ids"] + 1}, nll=1.0, perplexity=2.0),
        Results(arrays=arrays, nll=1.5, perplexity=2.0),
        Results(arrays=arrays, nll=1.0, perplexity=2.5),
        Results(arrays=arrays, nll=1.0, perplexity=2.0, failed=b"x"),
    ]
    assert len({result_digest(one) for one in (good, *others)}) == 6
    assert result_digest(good) != result_digest(good, 0)
