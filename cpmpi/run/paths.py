"""Every path of a run folder, in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cpmpi.run.publish import TEMPORARY_SUFFIX

OURS = re.compile(r"run\.h5|(topology|schedule)\.json|summary\.csv|shards/rank-\d{5,}\.h5|report/surprisal-\d{6,}\.png")


@dataclass(frozen=True)
class RunPaths:
    """The paths of the run in ``folder``."""

    folder: Path

    @property
    def index(self) -> Path:
        """``run.h5``: metadata, outputs and virtual datasets; what anyone opens."""
        return self.folder / "run.h5"

    @property
    def shards(self) -> Path:
        """The folder of the shard files; absent when the run keeps no KV."""
        return self.folder / "shards"

    def shard(self, rank: int) -> Path:
        """The shard file of ``rank``."""
        return self.folder / shard_name(rank)

    @property
    def topology(self) -> Path:
        """The machine that the run was made on."""
        return self.folder / "topology.json"

    @property
    def schedule(self) -> Path:
        """Who sent what to whom."""
        return self.folder / "schedule.json"

    @property
    def summary(self) -> Path:
        """A line per document, written when the run is complete."""
        return self.folder / "summary.csv"

    @property
    def log(self) -> Path:
        """The folder of the ranks' logs."""
        return self.folder / "log"

    @property
    def report(self) -> Path:
        """The folder of the pictures."""
        return self.folder / "report"

    @property
    def lock(self) -> Path:
        """What the one job holds that may write."""
        return self.log / "lock"

    def contents(self) -> tuple[list[Path], list[Path]]:
        """The files in the folder that runs put there (or a killed one left behind), and all others, both sorted.

        Logs, which may be anything, and what a network file system keeps of a deleted file that is open (``.nfs...``)
        are neither.
        """
        found = [p for p in self.folder.iterdir() if p not in (self.shards, self.log, self.report) or not p.is_dir()]
        for folder in (self.shards, self.report):
            if folder.is_dir():
                found += folder.iterdir()
        names = [(path, path.relative_to(self.folder).as_posix().removesuffix(TEMPORARY_SUFFIX)) for path in found]
        ours = sorted(path for path, name in names if OURS.fullmatch(name))
        return ours, sorted({*found} - {*ours} - {path for path in found if path.name.startswith(".nfs")})


def shard_name(rank: int) -> str:
    """The shard file of ``rank``, relative to the run folder."""
    return f"shards/rank-{rank:05d}.h5"


def document_name(index: int) -> str:
    """The group of a document, the same in ``run.h5`` and in the shards."""
    return f"/documents/{index:06d}"
