"""Rates that are kept between jobs: found again for the same machines and shape only, and never trusted blindly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cpmpi.kernels import rate_cache

FLOPS = {"cpu": 2e9, "blocked": 1e9}
CPU = torch.device("cpu")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "cpmpi"


def test_kept_for_the_same_machines_and_shape(cache: Path) -> None:
    rate_cache.save(["a", "b"], "shape", FLOPS)
    assert rate_cache.load(["b", "a"], "shape", ["cpu", "blocked"]) == FLOPS
    assert rate_cache.load(["a", "b"], "shape", ["blocked"]) == {"blocked": 1e9}
    for machines, shape in ((["a"], "shape"), (["a", "b", "b"], "shape"), (["a", "b"], "other")):
        assert rate_cache.load(machines, shape, ["cpu"]) is None
    assert rate_cache.load(["a", "b"], "shape", ["cpu", "new"]) is None
    (file,) = cache.iterdir()  # nothing is left beside it
    assert json.loads(file.read_text())["machines"] == ["a", "b"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"flops": []}', '{"flops": {"cpu": "2"}}', '{"flops": {"cpu": -1.0}}',
             '{"flops": {"cpu": NaN}}', '{"flops": {"cpu": Infinity}}', "\udcff"],
)  # fmt: skip
def test_what_is_damaged_is_measured_anew(cache: Path, text: str) -> None:
    file = rate_cache.file_of(["a"], "shape")
    assert file is not None
    cache.mkdir()
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    assert rate_cache.load(["a"], "shape", ["cpu"]) is None
    rate_cache.save(["a"], "shape", FLOPS)
    assert rate_cache.load(["a"], "shape", ["cpu"]) == {"cpu": 2e9}


def test_a_folder_that_cannot_be_written_is_none(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    rate_cache.save(["a"], "shape", FLOPS)
    assert rate_cache.load(["a"], "shape", ["cpu"]) is None
    assert cache.read_text() == "a file where the folder should be"


def test_the_machine_says_what_speed_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    before = rate_cache.machine(CPU)
    assert f"torch {torch.__version__}" in before
    assert f"{torch.get_num_threads()} threads" in before
    for name in rate_cache.FORCED:
        monkeypatch.setenv(name, "AVX2")
        assert f"{name}=AVX2" in rate_cache.machine(CPU)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert "7 threads" in rate_cache.machine(CPU)
