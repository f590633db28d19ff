"""docs/run-folder.md: its examples run, and it names everything that is in the files."""

import re
import shutil
import subprocess
import sys

import h5py
import pytest

from tests.conftest import ROOT
from tests.runs import make_run

TEXT = (ROOT / "docs" / "run-folder.md").read_text(encoding="utf-8")


@pytest.fixture
def run_here(tmp_path, monkeypatch):
    """The run folder RUN in the current folder."""
    make_run(tmp_path / "RUN")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "RUN"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_examples(run_here, code, capsys):
    names: dict[str, object] = {}
    exec(code, names)
    assert getattr(names["key"], "shape") == (10, 2, 4)  # noqa: B009
    assert capsys.readouterr().out


@pytest.mark.parametrize("line", "".join(blocks("sh")).splitlines())
def test_shell_examples(run_here, line):
    if line.startswith("h5dump") and not shutil.which("h5dump"):
        pytest.skip("h5dump (hdf5-tools) is not installed")
    line = line.replace("cpmpi", f'{sys.executable} -c "from cpmpi.jobs.cli import main; main()"', 1)
    done = subprocess.run(line, shell=True, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("path", ["run.h5", "shards/rank-00000.h5"])
def test_everything_is_documented(run_here, path):
    def check(name: str, item: object) -> None:
        assert isinstance(item, h5py.Group | h5py.Dataset)
        documented = isinstance(item, h5py.Group) or "`/" + re.sub(r"\d{6}", "000000", name) + "`" in TEXT
        assert documented, f"{path}: {name} is not in docs/run-folder.md"
        for attribute in item.attrs:
            assert f"`{attribute}`" in TEXT or attribute == "DIMENSION_LABELS", (
                f"{path}: attribute {attribute} of {name}"
            )

    with h5py.File(run_here / path) as file:
        check("", file)
        file.visititems(check)
