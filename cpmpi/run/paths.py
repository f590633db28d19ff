"""Every path of a run folder, in one place."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from cpmpi.run.publish import TEMPORARY_SUFFIX

# A checkpoint's manifest, or with a rank its part of one; the document by the first digits of its identity.
IDENTITY_DIGITS = 12
CHECKPOINT = re.compile(r"(?P<document>[0-9a-f]{12})-layer-(?P<layer>\d{5,})(\.json|-rank-(?P<rank>\d{5,})\.h5)")
OURS = re.compile(
    r"run\.h5(\.deleted)?|(topology|schedule)\.json|(summary|scores|spans)\.csv|shards/(\d{6}/)?rank-\d{5,}\.h5"
    r"|report/(report\.html|(surprisal-\d{6,}|perplexity|timeline|machine)\.(png|svg))"
    rf"|checkpoints/{CHECKPOINT.pattern}"
)
PARTS = "parts"
CLAIM = re.compile(r"(\d{6,}|run)\.(claim|cleanup)(\.lock)?(_\d+)?|\d{6,}\.cleanup\.lock(_\d+)?")


@dataclass(frozen=True)
class RunPaths:
    """The paths of the run in ``folder``."""

    folder: Path

    @property
    def index(self) -> Path:
        """``run.h5``: metadata, outputs and virtual datasets; what anyone opens."""
        return self.folder / "run.h5"

    @property
    def deleted(self) -> Path:
        """What ``run.h5`` is called while the run is deleted: what is left is known as a run's, and is no run."""
        return self.folder / "run.h5.deleted"

    @property
    def repair(self) -> Path:
        """Where a shard is laid out anew, before it takes its place."""
        return self.folder / "repair"

    @classmethod
    def of(cls, path: Path) -> RunPaths:
        """Of a run that is named by its folder, or by the ``run.h5`` in it."""
        return cls(path.parent if path.name == "run.h5" else path)

    @property
    def shards(self) -> Path:
        """The folder of the shard files; absent when the run keeps no KV."""
        return self.folder / "shards"

    def shard(self, rank: int, shard_set: int = 0) -> Path:
        """The file of ``rank`` in a set of shards."""
        return self.folder / shard_name(rank, shard_set)

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints inside documents."""
        return self.folder / "checkpoints"

    def checkpoint(self, identity: str, layer: int) -> Path:
        """The manifest of the checkpoint of a document after a layer."""
        return self.checkpoints / f"{identity[:IDENTITY_DIGITS]}-layer-{layer:05d}.json"

    def checkpoint_part(self, identity: str, layer: int, rank: int) -> Path:
        """The part of ``rank`` in it."""
        return self.checkpoints / f"{identity[:IDENTITY_DIGITS]}-layer-{layer:05d}-rank-{rank:05d}.h5"

    @property
    def parts(self) -> Path:
        """The folder of the parts of a run that several jobs share, and of their claims; gone when it is complete."""
        return self.folder / PARTS

    def part(self, index: int) -> RunPaths:
        """The run of a document alone, while several jobs share the documents."""
        return RunPaths(self.parts / part_name(index))

    def every_part(self) -> list[RunPaths]:
        """The parts that are there."""
        return [RunPaths(path) for path in sorted(self.parts.glob("[0-9]" * 6)) if path.is_dir()]

    @property
    def whole(self) -> RunPaths:
        """The run that this one is a part of; itself where it is none."""
        within = self.folder.absolute().parent
        above = RunPaths(within.parent)
        return above if within.name == PARTS and above.index.exists() else self

    def claim(self, index: int) -> Path:
        """What the job puts down that works on a document."""
        return self.parts / f"{part_name(index)}.claim"

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
    def scores(self) -> Path:
        """A line per continuation, of a run of continuations."""
        return self.folder / "scores.csv"

    @property
    def spans(self) -> Path:
        """A line per span of each document's text, where spans are wanted; written when the run is complete."""
        return self.folder / "spans.csv"

    @property
    def log(self) -> Path:
        """The folder of the ranks' logs."""
        return self.folder / "log"

    @property
    def report(self) -> Path:
        """The folder of the page and the pictures of `cpmpi report`."""
        return self.folder / "report"

    @property
    def lock(self) -> Path:
        """What the one job holds that may write."""
        return self.log / "lock"

    def contents(self) -> list[Path]:
        """The files in the folder that runs put there, or a killed one left behind, sorted; logs are none of them."""
        within = (self.shards, self.report, self.checkpoints, *self.shards.glob("[0-9]" * 6))
        found = [path for folder in (self.folder, *within) if folder.is_dir() for path in folder.iterdir()]
        names = ((path, path.relative_to(self.folder).as_posix().removesuffix(TEMPORARY_SUFFIX)) for path in found)
        return sorted([*(path for path, name in names if OURS.fullmatch(name)), *self._contents_of_parts()])

    def _contents_of_parts(self) -> list[Path]:
        claims = [path for path in self.parts.glob("*.*") if CLAIM.fullmatch(path.name)]
        return [*claims, *(p for part in self.every_part() for p in (*part.contents(), part.lock) if p.exists())]


def part_name(index: int) -> str:
    """The folder of a part, and the name of its claim."""
    return f"{index:06d}"


def shard_name(rank: int, shard_set: int = 0) -> str:
    """The file of ``rank`` in a set of shards, relative to the run folder; the first set is in ``shards`` itself."""
    return f"shards/{f'{shard_set:06d}/' if shard_set else ''}rank-{rank:05d}.h5"


def document_name(index: int, *, set_aside: bool = False) -> str:
    """The group of a document in ``run.h5``; in a shard, that of a document by its number there."""
    return f"/{'set_aside' if set_aside else 'documents'}/{index:06d}"
