"""``cpmpi verify`` finds every kind of damage and names the file, the document and the layer."""

import h5py
import numpy as np
import pytest
from click.testing import CliRunner

from cpmpi.errors import UserError
from cpmpi.jobs.verify import command
from cpmpi.run.hdf5 import changed_file, set_attribute
from cpmpi.run.paths import RunPaths
from cpmpi.run.results import read_results, result_digest
from cpmpi.run.verify import verify_run
from tests.runs import make_run, make_spec


@pytest.fixture
def run_folder(tmp_path):
    make_run(tmp_path)
    return tmp_path


def flip(path, dataset: str, element: tuple[int, ...]) -> None:
    """Flip one bit of one element of a contiguous dataset."""
    with h5py.File(path) as file:
        place = file[dataset]
        offset = (
            place.id.get_offset() + int(np.ravel_multi_index(element, place.shape)) * place.id.get_type().get_size()
        )
    with open(path, "r+b") as raw:
        raw.seek(offset)
        byte = raw.read(1)[0]
        raw.seek(offset)
        raw.write(bytes([byte ^ 1]))


def test_a_good_run(run_folder):
    done = CliRunner().invoke(command, [str(run_folder)])
    assert done.exit_code == 0
    assert done.output == f"{run_folder}: ok (3 documents, 3 shards, 4.96 kB of KV)\n"
    done = CliRunner().invoke(command, [str(run_folder), "--quick"])
    assert done.output == f"{run_folder}: ok (3 documents, 3 shards, no KV read)\n"


@pytest.mark.parametrize(("name", "element"), [("key", (1, 5, 0, 2)), ("value", (2, 0, 1, 2))])
def test_a_flipped_bit_of_kv(run_folder, name, element):
    shard = RunPaths(run_folder).shard(1)
    flip(shard, f"documents/000000/{name}", element)
    done = CliRunner().invoke(command, [str(run_folder)])
    assert done.exit_code == 1
    (line,) = done.output.splitlines()
    assert line.startswith(f"{shard}: document 'd0': layer {element[0]}: {name} of tokens ")
    assert line.endswith("does not have its checksum")
    pieces = make_spec().documents[0].pieces(1)
    expected = pieces[1] if element[1] == 5 else pieces[0]
    assert f"tokens {expected.start} to {expected.stop - 1} " in line
    assert CliRunner().invoke(command, [str(run_folder), "--quick"]).exit_code == 0


def test_a_flipped_bit_of_a_checksum(run_folder):
    shard = RunPaths(run_folder).shard(0)
    flip(shard, "documents/000002/checksum", (0, 0, 0))
    assert verify_run(run_folder, quick=True).problems == [
        f"{shard}: document 'd2': its checksums are not those that run.h5 recorded"
    ]


def test_an_unmarked_layer(run_folder):
    shard = RunPaths(run_folder).shard(0)
    flip(shard, "documents/000002/layer_done", (1,))
    assert verify_run(run_folder).problems == [f"{shard}: document 'd2': layers [1] were not written in full"]


@pytest.mark.parametrize(
    ("dataset", "element", "expected"),
    [
        ("token_ids", (3,), ["not have the checksum", "token ids are not those"]),
        ("logprobs", (3,), ["not have the checksum", "sum to"]),
        ("last_hidden", (3,), ["not have the checksum"]),
    ],
)
def test_a_flipped_bit_of_outputs(run_folder, dataset, element, expected):
    flip(RunPaths(run_folder).index, f"documents/000000/{dataset}", element)
    problems = verify_run(run_folder).problems
    assert len(problems) == len(expected)
    for problem, words in zip(problems, expected):
        assert problem.startswith(f"{run_folder}/run.h5: document 'd0': ")
        assert words in problem


@pytest.mark.parametrize(
    ("dataset", "position", "value", "expected"),
    [
        ("logprobs", 0, 0.0, r"logprobs[0] is 0.0, not NaN"),
        ("logprobs", 7, np.nan, "1 log-probabilities are not finite or above 0, the first at token 7"),
        ("logprobs", 8, -np.inf, "1 log-probabilities are not finite or above 0, the first at token 8"),
        ("logprobs", 9, 0.5, "1 log-probabilities are not finite or above 0, the first at token 9"),
        ("last_hidden", 2, np.inf, "last_hidden is not finite"),
    ],
)
def test_outputs_that_cannot_be_right(run_folder, dataset, position, value, expected):
    with changed_file(RunPaths(run_folder).index) as file:
        file[f"documents/000000/{dataset}"][position] = value
    assert any(expected in problem for problem in verify_run(run_folder).problems)


@pytest.mark.parametrize(
    ("name", "expected"), [("nll", "nll is 1.0, but"), ("perplexity", "perplexity is 1.0, not exp")]
)
def test_attributes_that_do_not_follow(run_folder, name, expected):
    """Neither their checksum, nor what they must be."""
    with changed_file(RunPaths(run_folder).index) as file:
        group = file["documents/000000"]
        set_attribute(group, name, 1.0)
    assert "d0': its results do not have the checksum" in verify_run(run_folder).problems[0]
    with changed_file(RunPaths(run_folder).index) as file:
        set_attribute(file["documents/000000"], "result_xxh3", result_digest(read_results(file["documents/000000"])))
    assert any(expected in problem for problem in verify_run(run_folder).problems)


def test_missing_truncated_and_foreign_shards(run_folder, tmp_path_factory):
    paths = RunPaths(run_folder)
    other = tmp_path_factory.mktemp("other")
    make_run(other)
    paths.shard(0).unlink()
    with open(paths.shard(1), "ab") as file:
        file.write(b"x")
    paths.shard(2).write_bytes(RunPaths(other).shard(2).read_bytes())
    problems = verify_run(run_folder).problems
    assert len(problems) == 3
    assert problems[0] == f"{paths.shard(0)}: no such file"
    assert "rank-00001.h5: has" in problems[1]
    assert "rank-00002.h5: belongs to run" in problems[2]
    done = CliRunner().invoke(command, [str(run_folder)])
    assert done.exit_code == 1
    assert done.output.splitlines() == problems


def test_pieces_that_moved(run_folder):
    flip(RunPaths(run_folder).shard(0), "documents/000000/pieces", (0, 1))
    assert verify_run(run_folder).problems == [
        f"{RunPaths(run_folder).shard(0)}: damaged: its structure does not have the checksum that it was laid out with"
    ]


def test_unfinished_runs_and_missing_summaries(tmp_path):
    make_run(tmp_path, stop_after=2)
    assert verify_run(tmp_path).problems == [f"{tmp_path}/run.h5: not complete: 2 of 3 documents are finished"]
    make_run(tmp_path)
    RunPaths(tmp_path).summary.unlink()
    assert verify_run(tmp_path).problems == [f"{tmp_path}/summary.csv: no such file"]


def test_no_run(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        verify_run(tmp_path)
