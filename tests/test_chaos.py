"""Jobs that are killed at random moments lose nothing; see `tests.chaos`."""

import pytest

from tests.chaos import KINDS, chaos


@pytest.mark.slow  # CI runs the short one by `make chaos-short`
@pytest.mark.parametrize("kills", [10, 60])
def test_nothing_is_lost(kills, tmp_path):
    figures = chaos(tmp_path, kills)
    print(figures)
    assert figures.problems == []
    assert sum(figures.kills.values()) == kills
    assert figures.kills.keys() == set(KINDS)
    assert figures.saved, "SIGTERM and SIGUSR1 end a job with its state saved"
    assert figures.inside, "some starts went on inside a document"
