"""Every path of a run folder, in one place."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cpmpi.publish import TEMPORARY_SUFFIX


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
    def checkpoints(self) -> Path:
        """The folder of hidden states from which an unfinished document goes on; empty when the run is complete."""
        return self.folder / "checkpoints"

    @property
    def report(self) -> Path:
        """The folder of the pictures."""
        return self.folder / "report"

    def foreign(self) -> list[str]:
        """Names in the folder, sorted, that no run puts there (what a killed run left behind is not foreign)."""
        files = [path.name for path in (self.index, self.topology, self.schedule, self.summary)]
        ours = {
            self.shards.name,
            self.log.name,
            self.report.name,
            self.checkpoints.name,
            *files,
            *(name + TEMPORARY_SUFFIX for name in files),
        }
        return sorted(path.name for path in self.folder.iterdir() if path.name not in ours)


def shard_name(rank: int) -> str:
    """The shard file of ``rank``, relative to the run folder."""
    return f"shards/rank-{rank:05d}.h5"


def document_name(index: int) -> str:
    """The group of a document, the same in ``run.h5`` and in the shards."""
    return f"/documents/{index:06d}"
