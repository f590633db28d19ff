"""Reading a run: exact numbers from any slice, or an error that names the file."""

import shutil
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import cpmpi
from cpmpi import open_run
from cpmpi.errors import UserError
from cpmpi.run.hdf5 import changed_file, set_attribute
from cpmpi.run.paths import RunPaths
from tests.runs import KV, kv_of, make_run, make_spec, outputs_of


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A whole run that tests only read."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    make_run(folder)
    return folder


def test_outputs(run_folder):
    with open_run(run_folder) as run:
        assert run.complete
        assert run.world_size == 3
        assert run.attributes["model_sha256"] == "a" * 64
        assert [document.id for document in run.documents] == ["d0", "d1", "d2"]
        assert len(run.documents) == 3
        document = run.documents["d2"]
        assert (document.index, document.source, document.n_tokens, document.complete) == (2, "corpus.jsonl:2", 7, True)
        expected = outputs_of(2, 7)
        np.testing.assert_array_equal(document.token_ids, expected["token_ids"])
        np.testing.assert_array_equal(document.logprobs, expected["logprobs"])
        np.testing.assert_array_equal(document.last_hidden, expected["last_hidden"])
        assert document.nll == pytest.approx(-expected["logprobs"][1:].astype(np.float64).sum(), rel=1e-15)
        assert document.perplexity == pytest.approx(np.exp(document.nll / 6), rel=1e-15)
        assert document.kv_shape == (3, 7, 2, 4, 3)


def test_documents_by_place_and_id(run_folder):
    with open_run(run_folder / "run.h5") as run:
        assert run.documents[-1].id == "d2"
        assert [document.id for document in run.documents[1:]] == ["d1", "d2"]
        with pytest.raises(IndexError):
            run.documents[3]
        with pytest.raises(KeyError, match=r"no document 'x' among 3 \('d0', 'd1', 'd2'\)"):
            run.documents["x"]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2), st.one_of(st.none(), st.integers(-60, 60)), st.one_of(st.none(), st.integers(-60, 60)))
def test_any_slice_of_kv(run_folder, layer, start, stop):
    with open_run(run_folder) as run:
        found = run.documents[0].kv(layer, start, stop, as_torch=True)
        for got, whole in zip(found, kv_of(0, layer, 50)):
            expected = whole.bfloat16()[slice(start, stop)]
            assert got.dtype == torch.bfloat16
            assert got.shape == expected.shape
            assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_form_of_kv(tmp_path, dtype):
    make_run(tmp_path, make_spec(kv=replace(KV, dtype=dtype)))
    expected = kv_of(2, 1, 7)[0].to(getattr(torch, dtype))
    with open_run(tmp_path) as run:
        document = run.documents[2]
        assert torch.equal(document.kv(1, as_torch=True)[0], expected)
        numbers = document.kv(1)[0]
        assert numbers.dtype == (np.float16 if dtype == "float16" else np.float32)
        np.testing.assert_array_equal(numbers, expected.float().numpy())
        raw = document.kv(1, raw=True)[0]
        if dtype == "bfloat16":
            np.testing.assert_array_equal(raw, expected.view(torch.uint16).numpy())
        else:
            np.testing.assert_array_equal(raw, expected.numpy())


def test_the_virtual_dataset_agrees_wherever_the_folder_is(tmp_path, monkeypatch):
    """Shards are named relative to run.h5: a run that is moved, and read from anywhere, is whole."""
    make_run(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "run").rename(tmp_path / "elsewhere" / "renamed")
    monkeypatch.chdir("/")
    with open_run(moved) as run, h5py.File(moved / "run.h5") as file:
        for document in run.documents:
            virtual = file[f"documents/{document.index:06d}/kv"]
            for layer in range(3):
                key_TGD, value_TGE = document.kv(layer)
                np.testing.assert_array_equal(virtual["key"][layer], key_TGD)
                np.testing.assert_array_equal(virtual["value"][layer], value_TGE)


@pytest.mark.skipif(not shutil.which("h5dump"), reason="h5dump (hdf5-tools) is not installed")
def test_h5dump_reads_the_virtual_dataset(run_folder):
    line = ["h5dump", "-y", "-w", "1", "-d", "/documents/000001/kv/key[0,0,0,0;;1,2,2,4]", str(run_folder / "run.h5")]
    text = subprocess.run(line, capture_output=True, text=True, check=True, cwd="/").stdout
    numbers = text.split("DATA {")[1].split("}")[0].replace(",", " ").split()
    expected = kv_of(1, 0, 2)[0].bfloat16().float().numpy().ravel()
    np.testing.assert_allclose([float(number) for number in numbers], expected, rtol=1e-5)


def test_a_missing_shard_is_an_error_not_a_fill_value(tmp_path):
    make_run(tmp_path)
    shard = RunPaths(tmp_path).shard(1)
    shard.rename(tmp_path / "shards" / "moved.h5")
    with open_run(tmp_path) as run:
        with pytest.raises(UserError, match=r"shards/rank-00001\.h5: no such file"):
            run.documents[0].kv(0)
        with h5py.File(tmp_path / "run.h5") as file:
            assert np.isnan(file["documents/000000/kv/key"][0]).any(), "and through HDF5 it shows as NaN"
        only_rank_0 = run.documents[0].spec.pieces(0)[0]
        run.documents[0].kv(0, *only_rank_0)


def test_a_truncated_shard_is_an_error(tmp_path):
    make_run(tmp_path)
    shard = RunPaths(tmp_path).shard(2)
    size = shard.stat().st_size
    with open(shard, "r+b") as file:
        file.truncate(size - 1)
    with open_run(tmp_path) as run, pytest.raises(UserError, match=r"rank-00002\.h5: .*"):
        run.documents[0].kv(0)
    with open(shard, "r+b") as file:
        file.truncate(size + 1)
    with open_run(tmp_path) as run:
        message = rf"rank-00002\.h5: has {size + 1} bytes, but the run recorded {size}: truncated or replaced"
        with pytest.raises(UserError, match=message):
            run.documents[0].kv(0)


def test_a_shard_of_another_run_is_an_error(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    shutil.copy(RunPaths(tmp_path / "b").shard(0), RunPaths(tmp_path / "a").shard(0))
    with open_run(tmp_path / "a") as run, pytest.raises(UserError, match=r"a/shards/rank-00000\.h5: belongs to run"):
        run.documents[0].kv(0)


def test_an_unfinished_document_is_an_error(tmp_path):
    make_run(tmp_path, stop_after=1)
    with open_run(tmp_path) as run:
        assert not run.complete
        assert run.documents[0].complete
        document = run.documents["d1"]
        assert np.isnan(document.nll)
        for read in (lambda: document.logprobs, lambda: document.kv(0)):
            with pytest.raises(
                UserError, match=r"run\.h5: document 'd1' is not complete; start the same command again"
            ):
                read()


def test_bad_layers(run_folder):
    with open_run(run_folder) as run:
        for layer in (3, -1):
            with pytest.raises(IndexError, match=f"layer {layer} of 3"):
                run.documents[0].kv(layer)


def test_folders_without_a_run(tmp_path):
    with pytest.raises(UserError, match=r"nothing: no run here \(no run\.h5\)"):
        open_run(tmp_path / "nothing")
    with h5py.File(tmp_path / "run.h5", "w"):
        pass
    with pytest.raises(UserError, match=r"run\.h5: format None version None, expected 'cpmpi-run' 2"):
        open_run(str(tmp_path))


def test_a_run_can_be_read_while_it_is_written(tmp_path):
    make_run(tmp_path, stop_after=1)
    with changed_file(RunPaths(tmp_path).index) as file:
        set_attribute(file["documents/000001"], "nll", 5.0)
        code = f"import cpmpi; r = cpmpi.open_run({str(tmp_path)!r}); print(r.documents[0].logprobs.shape)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "(50,)\n"


def test_reading_does_not_import_torch(run_folder):
    code = (
        "import sys, cpmpi\n"
        "assert not {'h5py', 'numpy', 'torch'} & set(sys.modules), 'import cpmpi must stay light'\n"
        f"cpmpi.open_run({str(run_folder)!r}).documents[0].kv(0)\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_public_names():
    with pytest.raises(AttributeError, match="module 'cpmpi' has no attribute 'opun_ron'"):
        cpmpi.opun_ron  # noqa: B018
