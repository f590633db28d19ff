"""The wheel and the editable install: linked folders arrive under ``cpmpi``, nothing arrives at the top level."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT

FOLDERS = ("jobs", "kernels", "slurm", "topology")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    (path,) = folder.glob("cpmpi-*.whl")
    return path


def modules_of(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*.py")}


def test_wheel_holds_every_module_once_under_cpmpi(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    modules = {name for name in names if name.endswith(".py")}
    expected = {f"cpmpi/{name}" for name in modules_of(ROOT / "cpmpi") if name.split("/")[0] not in FOLDERS}
    expected |= {f"cpmpi/{folder}/{name}" for folder in FOLDERS for name in modules_of(ROOT / folder)}
    assert modules == expected
    assert not {f"cpmpi/{folder}/__init__.py" for folder in FOLDERS} & modules
    assert {name.split("/")[0] for name in names} == {"cpmpi", next(n for n in names if "dist-info" in n).split("/")[0]}
    assert "cpmpi/py.typed" in names
    page = {f"cpmpi/report/page/{file.name}" for file in (ROOT / "cpmpi" / "report" / "page").iterdir()}
    assert page <= set(names)
    assert len(page) == 9


def run_away_from_the_checkout(code: str, tmp_path: Path, path: str = "") -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ({"PYTHONPATH": path} if path else {})
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_wheel_runs_where_it_is_unpacked(wheel, tmp_path):
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        entry = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("entry_points.txt"))
    assert "cpmpi = cpmpi.jobs.cli:main" in entry
    assert "[lm_eval.models]\ncpmpi = cpmpi.engine.harness:CpmpiLM" in entry
    code = "import cpmpi.jobs.cli, cpmpi.kernels.select, cpmpi.topology.describe as d; print(d.__file__)"
    assert run_away_from_the_checkout(code, tmp_path, str(site)).startswith(str(site))


def test_editable_install_is_this_checkout(tmp_path):
    """`make` installs the checkout so: the modules come from here, and Hugging Face's `kernels` is not shadowed."""
    try:
        where = run_away_from_the_checkout("import cpmpi.kernels.select as s; print(s.__file__)", tmp_path)
    except subprocess.CalledProcessError:
        pytest.skip("cpmpi is not installed in this environment")
    assert Path(where).resolve() == ROOT / "kernels" / "select.py"
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s is not None and s.origin is None)"
    assert run_away_from_the_checkout(code, tmp_path) == "False", "a top-level `kernels` would break transformers"


def test_importing_cpmpi_is_cheap(tmp_path):
    heavy = "torch", "transformers", "mpi4py", "h5py", "matplotlib"
    code = f"import cpmpi.jobs.cli, sys; print([m for m in {heavy!r} if m in sys.modules])"
    assert run_away_from_the_checkout(code, tmp_path, str(ROOT)) == "[]"
