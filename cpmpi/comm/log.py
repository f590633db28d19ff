"""A log file per rank; every line carries rank and world size."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpmpi.comm.ranks import Ranks, node_name


@contextmanager
def rank_log(folder: Path, ranks: Ranks) -> Iterator[logging.Logger]:
    """Log to ``folder/rank-00000.log`` through the logger ``cpmpi`` while the block runs; lines are appended."""
    folder.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(folder / f"rank-{ranks.rank:05d}.log", encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(logging.Formatter(f"%(asctime)s {ranks.rank}/{ranks.size} %(levelname)s %(message)s"))
    logger = logging.getLogger("cpmpi")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    logging.raiseExceptions = False  # a full disk is told of by what must be written, in one line
    try:
        from mpi4py import MPI

        library = MPI.Get_library_version().splitlines()[0].strip("\0 ")
        logger.info("on %s; %s; mpi4py with %s", node_name(), MPI.Get_processor_name(), library)
        yield logger
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):
            handler.close()
