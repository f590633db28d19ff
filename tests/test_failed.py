"""A document without a result, and files that cannot be written: said once, plainly, and everything else goes on."""

import csv
import errno
import json
import os
import resource
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

from cpmpi import open_run
from cpmpi.errors import UserError
from cpmpi.jobs import inspect, report
from cpmpi.run.folder import check_folder, start_index
from cpmpi.run.index import NotFiniteError
from cpmpi.run.index_layout import REASON_BYTES
from cpmpi.run.lock import only_writer
from cpmpi.run.paths import RunPaths
from cpmpi.run.publish import make_folder, publish_text
from cpmpi.run.results import sum_nll
from cpmpi.run.verify import verify_run
from tests.runs import make_run, make_spec, outputs_of

REASON = "2 log-probabilities are not finite, the first at token 17: größer als float16"


@pytest.fixture
def with_a_failure(tmp_path):
    """A run at its end, without KV: d0 and d2 are finished, d1 failed."""
    index = start_index(tmp_path, make_spec(kv=None))
    index.write_outputs(0, **outputs_of(0, 50))
    index.mark_failed(1, REASON)
    index.write_outputs(2, **outputs_of(2, 7))
    index.finish()
    return tmp_path


def test_a_failed_document_is_said_everywhere(with_a_failure):
    folder = with_a_failure
    with open_run(folder) as run:
        assert run.complete
        document = run.documents["d1"]
        assert (document.complete, document.failed) == (False, REASON)
        assert np.isnan(document.nll)
        with pytest.raises(UserError, match=r"run\.h5: document 'd1' failed: 2 log-prob"):
            document.logprobs  # noqa: B018
        assert repr(document) == f"<Document 'd1': 2 tokens, failed: {REASON}>"
        assert repr(run) == f"<Run {folder}: 3 documents, 2 finished, 1 failed, 59 tokens, no KV>"
    assert verify_run(folder).problems == [f"{folder}/run.h5: document 'd1' failed: {REASON}"]
    with open(RunPaths(folder).summary, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [(line["complete"], line["failed"]) for line in lines] == [("yes", ""), ("no", REASON), ("yes", "")]
    text = CliRunner().invoke(inspect.command, [str(folder)]).output
    assert "state     complete: 2 of 3 documents, 1 failed\n" in text
    assert f"failed    d1: {REASON}\n" in text
    facts = json.loads(CliRunner().invoke(inspect.command, [str(folder), "--json"]).output)
    assert [document["failed"] for document in facts["documents"]] == [None, REASON, None]
    assert facts["unfinished"] is None


def test_a_failed_document_is_known_to_the_next_start_and_may_be_tried_again(with_a_failure):
    index = start_index(with_a_failure, make_spec(kv=None))
    assert index.finished == {0, 2}
    assert index.failed == {1: REASON}
    index.write_outputs(1, **outputs_of(1, 2))
    assert index.failed == {}
    index.finish()
    assert verify_run(with_a_failure).problems == []


def test_a_long_reason_is_cut_between_characters(tmp_path):
    index = start_index(tmp_path, make_spec((5,), world=1, kv=None))
    index.mark_failed(0, "ä\n" * 1000)
    with open_run(tmp_path) as run:
        kept = run.documents[0].failed
    assert kept == " ".join("ä" * 160)
    assert len(kept.encode()) == REASON_BYTES - 1


def test_what_is_not_finite_is_an_error_of_its_own(tmp_path):
    index = start_index(tmp_path, make_spec((5,), world=1, kv=None))
    good = outputs_of(0, 5)
    for bad in ({"logprobs": good["logprobs"] * np.inf}, {"last_hidden": np.full(8, np.nan)}):
        with pytest.raises(NotFiniteError, match=r"document 'd0' \(corpus"):
            index.write_outputs(0, **{**good, **bad})
    with pytest.raises(UserError) as other:
        index.write_outputs(0, **{**good, "token_ids": good["token_ids"] + 1})
    assert not isinstance(other.value, NotFiniteError)


def test_report_shows_the_finished_documents_of_an_unfinished_run(tmp_path):
    index = start_index(tmp_path, make_spec((50, 2, 7), kv=None))
    index.write_outputs(0, **outputs_of(0, 50))
    index.mark_failed(1, REASON)
    result = CliRunner().invoke(report.command, [str(tmp_path)])
    assert result.exit_code == 0, result.output
    (line,) = result.stdout.splitlines()
    assert line.startswith(f"{RunPaths(tmp_path).report / 'report.html'}: 3 documents, ")


def test_reprs_and_the_table(tmp_path, monkeypatch):
    make_run(tmp_path, stop_after=1)
    with open_run(tmp_path) as run:
        assert repr(run) == f"<Run {tmp_path}: 3 documents, 1 finished, 59 tokens, KV in bfloat16>"
        assert repr(run.documents) == "<3 documents: 'd0', 'd1', 'd2'>"
        perplexity = f"{run.documents[0].perplexity:.6g}"
        assert repr(run.documents[0]) == f"<Document 'd0': 50 tokens, perplexity {perplexity}, KV of 3 layers>"
        assert repr(run.documents[1]) == "<Document 'd1': 2 tokens, not finished>"
        monkeypatch.setitem(sys.modules, "pandas", None)
        columns = run.summary()
        assert columns["id"].tolist() == ["d0", "d1", "d2"]
        assert columns["n_tokens"].tolist() == [50, 2, 7]
        assert columns["complete"].tolist() == [True, False, False]
        assert columns["nll"][0] == run.documents[0].nll
        assert np.isnan(columns["perplexity"][1:]).all()
        monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=lambda table: ("frame", sorted(table))))
        assert run.summary() == ("frame", sorted(columns))


def test_nothing_to_predict_is_zero_and_not_minus_zero():
    assert str(sum_nll(np.array([np.nan], np.float32))) == "0.0"


def refuse(number: int):
    """A call of the system that fails."""

    def call(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return call


def test_folders_that_cannot_be_written_are_named_in_a_line(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        real, no = os.open, refuse(errno.EROFS)
        patch.setattr(os, "open", lambda path, *args: (no if str(path).endswith("lock") else real)(path, *args))
        with (
            pytest.raises(UserError, match=r"run/log/lock: cannot be made \(Read-only file system\)"),
            only_writer(tmp_path / "run"),
        ):
            pass
    (tmp_path / "link").symlink_to("nowhere")
    for look in (check_folder, make_folder):
        with pytest.raises(UserError, match=r"link: is a link to nowhere, which does not exist"):
            look(tmp_path / "link")
    for look in (check_folder, make_folder, open_run):
        with pytest.raises(UserError, match=r"x{300}.*\(File name too long\)"):
            look(tmp_path / ("x" * 300))


@pytest.fixture
def small_disk():
    """Files of at most 20,000 bytes, as a disk has them that fills."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size=20000: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_is_said_with_the_file(tmp_path, small_disk):
    index = start_index(tmp_path / "begun", make_spec((5,), world=1, kv=None))
    index.write_outputs(0, **outputs_of(0, 5))
    small_disk()
    with pytest.raises(UserError, match=r"run/run\.h5: cannot be laid out \(.*\)$"):
        start_index(tmp_path / "run", make_spec((5000,), world=1))
    assert list((tmp_path / "run").iterdir()) == []
    with pytest.raises(UserError, match=r"a\.json: cannot be written \(File too large\)"):
        publish_text(tmp_path / "a.json", "x" * 30000)
    small_disk(10)
    with pytest.raises(UserError, match=r"begun/summary\.csv: cannot be written \(File too large\)"):
        index.finish()
    small_disk(resource.RLIM_INFINITY)
    with open_run(tmp_path / "begun") as run:
        assert not run.complete
    index.finish()
    assert verify_run(tmp_path / "begun").problems == []


def test_a_disk_that_fills_under_the_results(tmp_path, monkeypatch):
    index = start_index(tmp_path, replace(make_spec((5,), world=1, kv=None)))
    with monkeypatch.context() as patch:
        patch.setattr("cpmpi.run.hdf5.os.pwrite", refuse(errno.ENOSPC))
        with pytest.raises(UserError, match=r"run\.h5: cannot be written \(No space left on device\)"):
            index.write_outputs(0, **outputs_of(0, 5))
    with monkeypatch.context() as patch:
        patch.setattr("cpmpi.run.publish.os.fsync", refuse(errno.EIO))
        with pytest.raises(UserError, match=r"run\.h5: cannot be written \(Input/output error\)"):
            index.mark_failed(0, "bad")
    index.write_outputs(0, **outputs_of(0, 5))
    index.finish()
    assert verify_run(tmp_path).problems == []


def refuse_results(*_, **__):
    raise UserError("run.h5: cannot be written (No space left on device)")


@pytest.mark.mpi(2)
def test_a_document_that_fails_leaves_the_others_alone(tmp_path, capsys, monkeypatch):
    """A token whose embedding is not a number: its document is marked, the others are done, the exit status is 1."""
    from mpi4py import MPI
    from safetensors.torch import load_file, save_file

    from cpmpi.run.reader import open_run

    from .test_bad_input import call
    from .test_exact import save_llama, shared_folder

    comm = MPI.COMM_WORLD
    folder = shared_folder(tmp_path)
    if comm.rank == 0:
        save_llama(folder / "model", 2)
        weights = load_file(folder / "model" / "model.safetensors")
        weights["model.embed_tokens.weight"][7] = float("nan")
        save_file(weights, folder / "model" / "model.safetensors", {"format": "pt"})
        lines = [{"id": name, "token_ids": ids} for name, ids in (("a", [1, 2, 3]), ("b", [4, 7, 5]), ("c", [6, 8]))]
        (folder / "d.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    comm.Barrier()
    words = ["prefill", "--quiet", "--model", f"{folder}/model", "--input", f"{folder}/d.jsonl", "--output"]
    with monkeypatch.context() as patch:  # a disk that is full for the results takes no checkpoint along
        deleted = []
        patch.setattr("cpmpi.run.checkpoint.delete", lambda *_, **kept: deleted.append(kept))
        patch.setattr("cpmpi.run.index.RunIndex.write_outputs", refuse_results)
        assert call([*words, f"{folder}/full"], capsys)[0] == 1
        assert all("keep" in kept for kept in deleted)
    status, told = call([*words, f"{folder}/fast", "--fail-fast"], capsys)
    assert status == 1
    for _ in range(2):  # a second start does not meet it again
        status, told = call([*words, f"{folder}/run"], capsys)
        assert status == 1
        if comm.rank == 0:
            assert "error: 1 of 3 documents failed; the first: document 'b'" in told
            assert "are not finite" in told
    with open_run(folder / "run") as run, open_run(folder / "fast") as fast:
        assert [d.complete for d in run.documents] == [True, False, True]
        assert "not finite" in run.documents[1].failed
        assert [d.complete for d in fast.documents] == [True, False, False]
