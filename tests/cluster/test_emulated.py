"""The emulated cluster leaves nothing behind."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import ROOT, clean_environment
from .emulated import running, why_not

NAME = "cpmpi-second"
pytestmark = [pytest.mark.cluster, pytest.mark.skipif(why_not() is not None, reason=why_not() or "")]


def left_behind() -> list[str]:
    folders = [Path("/run/netns"), Path("/run/utsns"), Path("/etc/netns"), Path("/tmp")]
    return [
        str(p) for f in folders if f.exists() for p in f.iterdir() if p.name.startswith(NAME) and p.suffix != ".lock"
    ]


def fail_inside() -> None:
    with running(NAME) as cluster:
        assert cluster.on("n2", "hostname") == "n2\n"
        assert left_behind()
        raise ZeroDivisionError


def test_a_failing_test_leaves_nothing():
    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert left_behind() == []


def test_what_a_killed_run_leaves_is_removed_by_the_next():
    code = (
        "import os, subprocess, time\n"
        "from tests.cluster.emulated import SCRIPT, running\n"
        f"with running({NAME!r}) as cluster:\n"
        "    sleeper = subprocess.Popen([str(SCRIPT), 'on', 'n1', 'sleep', '600'], env={**os.environ, "
        "**cluster._name}, start_new_session=True)\n"
        "    print(sleeper.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    killed = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=clean_environment()
    )
    assert killed.stdout is not None
    sleeper = int(killed.stdout.readline())
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert left_behind()
    assert Path(f"/proc/{sleeper}").exists()
    with running(NAME, wait_s=5) as cluster:
        assert cluster.on("n4", "hostname") == "n4\n"
        state = Path(f"/proc/{sleeper}/stat")
        assert not state.exists() or state.read_text().split(")")[1].split()[0] == "Z"
    assert left_behind() == []
