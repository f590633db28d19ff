"""Four emulated nodes for the whole session, with the links they promise; with Slurm; and with jobs on it."""

from collections.abc import Iterator
from contextlib import suppress

import pytest

from .emulated import NODE_MBIT, UPLINK_MBIT, Cluster, running, why_not
from .jobs import Jobs


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with running() as up:
        # Shapers let a burst of 256 KB pass, headers take some percent: 6% up, 5% down.
        slow, fast = up.rate_mbit("n1", "n3"), up.rate_mbit("n1", "n2", megabytes=16)
        assert 0.9 * UPLINK_MBIT < slow < 1.1 * UPLINK_MBIT, f"uplink set to {UPLINK_MBIT} Mbit/s, measured {slow:.0f}"
        assert 0.7 * NODE_MBIT < fast < 1.1 * NODE_MBIT, f"node link set to {NODE_MBIT} Mbit/s, measured {fast:.0f}"
        print(f"\nemulated cluster: uplink {slow:.0f} Mbit/s, node link {fast:.0f} Mbit/s")
        yield up


@pytest.fixture(scope="session")
def slurm_cluster(cluster: Cluster) -> Cluster:
    """The same with Slurm's tools at hand; the daemons start at the first use."""
    reason = why_not(slurm=True)
    if reason:
        pytest.skip(reason)
    return cluster


@pytest.fixture
def jobs(slurm_cluster, tmp_path) -> Jobs:
    """On a cluster whose nodes are all there: a test before may have lost one, or left a job that is completing."""
    made = Jobs(slurm_cluster, tmp_path)
    made.slurm("scancel", "--user=root")

    def idle() -> bool:
        states = dict(line.split() for line in made.slurm("sinfo", "-h", "-N", "-o", "%N %T").splitlines())
        for node, state in states.items():
            if state.startswith(("down", "drain")):
                with suppress(RuntimeError):  # where it has come back by itself
                    made.slurm("scontrol", "update", f"nodename={node}", "state=resume")
        return set(states.values()) == {"idle"}

    made.wait_for(idle, 180)
    return made
