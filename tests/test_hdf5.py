"""The HDF5 layer: types that every tool reads, fixed places, files that appear at once."""

import errno
import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
import torch
from h5py import h5t

from cpmpi.errors import UserError
from cpmpi.run import hdf5
from cpmpi.run.publish import publish_text, published
from cpmpi.run.steady import SteadyFile

SPECIAL = [0.0, -0.0, 1.0, -1.5, 3.140625, 1e-40, 65280.0, float("inf"), float("-inf"), float("nan")]


def bits_of(values: torch.Tensor) -> np.ndarray:
    return values.view(torch.int16).numpy().view(np.uint16)


def write_types(path) -> None:
    values = torch.tensor(SPECIAL)
    with hdf5.created_file(path, most_places=3) as file:
        for name, stored in hdf5.STORED_FLOATS.items():
            hdf5.create_contiguous(file, name, (len(SPECIAL),), stored.h5type(), labels=("token",))
    with h5py.File(path) as file, open(path, "r+b") as raw:
        for name, stored in hdf5.STORED_FLOATS.items():
            converted = values.to(getattr(torch, name))
            bits = bits_of(converted) if name == "bfloat16" else converted.numpy()
            assert bits.dtype.itemsize == stored.itemsize
            hdf5.pwrite_all(raw.fileno(), bits, hdf5.dataset_offset(file[name]))


@pytest.mark.parametrize("name", hdf5.STORED_FLOATS)
def test_h5py_reads_every_type_as_numbers(tmp_path, name):
    write_types(tmp_path / "types.h5")
    with h5py.File(tmp_path / "types.h5") as file:
        assert file[name].dtype.kind == "f"
        np.testing.assert_array_equal(file[name][:], torch.tensor(SPECIAL).to(getattr(torch, name)).float().numpy())


@pytest.mark.skipif(not shutil.which("h5dump"), reason="h5dump (hdf5-tools) is not installed")
def test_h5dump_prints_bfloat16_as_numbers(tmp_path):
    write_types(tmp_path / "types.h5")
    line = ["h5dump", "-y", "-d", "/bfloat16", str(tmp_path / "types.h5")]
    text = " ".join(subprocess.run(line, capture_output=True, text=True, check=True).stdout.split())
    assert "16-bit little-endian floating-point" in text
    assert "0, -0, 1, -1.5, 3.14062" in text
    assert "65280, inf, -inf, -nan" in text or "65280, inf, -inf, nan" in text


def test_bfloat16_widens_bit_for_bit():
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = hdf5.STORED_FLOATS["bfloat16"].widen(every)
    torch_wide = torch.from_numpy(every.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(wide.view(np.uint32), torch_wide.view(np.uint32))


def test_large_datasets_lie_on_pages_and_the_file_stays_sparse(tmp_path):
    with hdf5.created_file(tmp_path / "a.h5", most_places=2) as file:
        hdf5.create_contiguous(file, "small", (3,), h5t.STD_I32LE, fill=np.int32(-1))
        big = hdf5.create_contiguous(file, "big", (1 << 28,), h5t.IEEE_F32LE)
        assert hdf5.dataset_offset(big) % hdf5.ALIGNMENT_BYTES == 0
    assert (tmp_path / "a.h5").stat().st_size > 1 << 30
    assert (tmp_path / "a.h5").stat().st_blocks * 512 < 1 << 20
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["small"][:], [-1, -1, -1])


def test_a_file_appears_only_when_it_is_whole(tmp_path):
    publish_text(tmp_path / "a.txt", "old")

    def fail_halfway() -> None:
        with published(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    publish_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"


def test_an_attribute_is_changed_in_place(tmp_path):
    with hdf5.created_file(tmp_path / "a.h5", most_places=1, attributes=["complete"]) as file:
        file.attrs["complete"] = False
    before = (tmp_path / "a.h5").read_bytes()
    with hdf5.changed_file(tmp_path / "a.h5") as file:
        hdf5.set_attribute(file, "complete", True)
    after = (tmp_path / "a.h5").read_bytes()
    assert len(after) == len(before)
    assert sum(a != b for a, b in zip(before, after)) == 1
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["complete"]


def test_a_writer_is_not_stopped_by_somebody_who_looks(tmp_path):
    """h5py's own default would refuse to open the file for writing while another process has it open."""
    path = tmp_path / "a.h5"
    with hdf5.created_file(path, most_places=1, attributes=["complete"]) as file:
        file.attrs["complete"] = False
    look = "import h5py, sys; f = h5py.File(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", look, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as looker:
        assert looker.stdout is not None
        assert looker.stdout.readline() == "open\n"
        with hdf5.changed_file(path) as file:
            hdf5.set_attribute(file, "complete", True)
        looker.communicate("")


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.h5: no such file"):
        hdf5.open_file(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(UserError, match=r"text\.h5: cannot be read as HDF5"):
        hdf5.open_file(tmp_path / "text.h5")


def test_partial_writes_and_short_reads(tmp_path, monkeypatch):
    data = np.arange(100, dtype=np.uint8)
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, view, offset: real(fd, view[:7], offset))
    path = tmp_path / "bytes"
    with open(path, "w+b") as file:
        hdf5.pwrite_all(file.fileno(), data, 3)
        read = np.empty(100, np.uint8)
        hdf5.pread_all(file.fileno(), read, 3, path)
        np.testing.assert_array_equal(read, data)
        with pytest.raises(UserError, match=r"bytes: truncated: 2 bytes are missing at offset 103"):
            hdf5.pread_all(file.fileno(), read, 5, path)


def test_a_write_that_fails_is_remembered_and_goes_nowhere(tmp_path):
    with open("/dev/full", "r+b", buffering=0) as full:
        steady = SteadyFile(full)
        assert steady.write(b"abc") == 3
        assert steady.error is not None
        assert steady.error.errno == errno.ENOSPC
    with open(tmp_path / "a", "w+b", buffering=0) as raw:
        steady = SteadyFile(raw)
        assert steady.write(np.arange(5, dtype="<i4")) == 20
        assert (steady.tell(), steady.error) == (20, None)
        steady.error = OSError(errno.EIO, "before")
        assert steady.write(b"later") == 5
        assert steady.tell() == 25
    assert (tmp_path / "a").stat().st_size == 20


def test_an_error_of_the_disk_comes_before_what_hdf5_makes_of_it(tmp_path, monkeypatch):
    def fill(self, data):
        self.error = OSError(errno.ENOSPC, "No space left on device")
        return len(memoryview(data).cast("B"))

    def lay_out() -> None:
        with hdf5.created_file(tmp_path / "a.h5", most_places=1) as file:
            file.attrs["complete"] = False
            file.flush()
            raise RuntimeError("what HDF5 says")

    monkeypatch.setattr(SteadyFile, "write", fill)
    with pytest.raises(UserError, match=r"a\.h5: cannot be laid out \(No space left on device\)"):
        lay_out()
    assert list(tmp_path.iterdir()) == []
