"""The fixture ``cluster``: four emulated nodes for the whole session, with the links they promise."""

from collections.abc import Iterator

import pytest

from .emulated import NODE_MBIT, UPLINK_MBIT, Cluster, running, why_not


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
