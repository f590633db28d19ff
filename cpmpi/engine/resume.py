"""Go on inside a document: find its latest checkpoint that is whole, on every rank alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from cpmpi.comm.progress import Progress
from cpmpi.comm.ranks import Ranks
from cpmpi.engine.redeal import DamagedKVError, Redeal
from cpmpi.errors import UserError
from cpmpi.model.blocks import Blocks
from cpmpi.model.forward import Chunk
from cpmpi.run import checkpoint, folder
from cpmpi.run.hidden import SavedHidden
from cpmpi.run.manifest import Manifest
from cpmpi.run.spec import RunSpec
from cpmpi.text import duration


@dataclass(frozen=True, kw_only=True)
class Resume:
    """Where a document goes on.

    Attributes:
        blocks: of the model.
        last: number of the last block that is done.
        attention: number of the attention that comes next.
        spent_s: seconds of work before.
        hidden: the hidden states after that block.
    """

    blocks: Blocks
    last: int
    attention: int
    spent_s: float
    hidden: SavedHidden

    @property
    def done(self) -> list[str]:
        """The modules that do not run."""
        return [block.name for block in self.blocks.blocks[: self.last + 1]]

    def saved(self, chunk: Chunk) -> torch.Tensor:
        """The hidden states (C, ...) of a chunk, on the CPU."""
        return self.hidden.rows(chunk.start, chunk.stop)


@dataclass(frozen=True, kw_only=True)
class Seeker:
    """Looks for the checkpoints of documents.

    Args:
        folder, spec: of the run.
        ranks, blocks, progress: see `cpmpi.engine.checkpoint.Checkpoints`.
        redeal: of the KV, where it is kept.
    """

    folder: Path
    spec: RunSpec
    ranks: Ranks
    blocks: Blocks
    progress: Progress
    redeal: Redeal | None

    @contextmanager
    def find(self, index: int) -> Iterator[Resume | None]:
        """The latest checkpoint of a document that is whole, open; None where it begins anew. Collective.

        KV that others have made is dealt to these ranks. All other checkpoints of the document are deleted.

        Args:
            index: the document's place in the run.
        """
        document = self.spec.documents[index]
        identity = checkpoint.identity_of(self.spec, document)
        chosen: Resume | None = None
        all_found = self.ranks.on_root(checkpoint.find, self.folder, identity)
        for path, found in all_found:
            problem, resume = self._open(found, index)
            problems = [p for p in self.ranks.allgather(problem) if p is not None]
            if not problems:
                problems = self._deal(found, index)
            if not problems:
                chosen = resume
                break
            if resume is not None:
                resume.hidden.close()
            self.progress.say(f"{document.id}: the checkpoint {path} is not used: {problems[0]}")
        keep = chosen.last if chosen is not None else None
        self.ranks.on_root(checkpoint.delete, self.folder, identity, keep=keep)
        if all_found:  # else none of them held shards, which were looked through when the job started
            self.ranks.on_root(folder.delete_unused_shards, self.folder, self.spec)
        if chosen is None:
            yield None
            return
        self.progress.say(
            f"{document.id}: goes on after layer {chosen.last + 1} of {len(self.blocks.blocks)}: "
            f"{duration(chosen.spent_s)} of work are kept"
        )
        with closing(chosen.hidden):
            yield chosen

    def _open(self, found: Manifest | UserError, index: int) -> tuple[str | None, Resume | None]:
        """A checkpoint that is whole as far as this rank can see, or why it is not."""
        if isinstance(found, UserError):
            return str(found), None
        try:
            self._check(found, self.spec.documents[index].layout.n_tokens)
            if self.redeal is not None:
                self.redeal.check(found, index)
            hidden = SavedHidden(self.folder, found)
        except UserError as problem:
            return str(problem), None
        resume = Resume(
            blocks=self.blocks, last=found.layer, attention=found.attention, spent_s=found.seconds, hidden=hidden
        )
        try:
            hidden.check(self.ranks.rank, self.ranks.size)
        except UserError as problem:
            return str(problem), resume
        return None, resume

    def _deal(self, found: Manifest | UserError, index: int) -> list[str]:
        """Have the KV of a checkpoint in these ranks' shards; why that cannot be. Collective."""
        if self.redeal is None or isinstance(found, UserError) or not self.redeal.needed(found, index):
            return []
        try:
            self.redeal.move(found, index)
        except DamagedKVError as problem:
            return [str(problem)]
        return []

    def _check(self, found: Manifest, n_tokens: int) -> None:
        blocks = self.blocks
        if found.layer not in blocks.whole or blocks.blocks[found.layer].last + 1 != found.attention:
            raise UserError(f"this model cannot go on after layer {found.layer + 1}")
        dtype = str(blocks.dtype).removeprefix("torch.")
        if (found.n_tokens, found.shape, found.dtype) != (n_tokens, blocks.shape, dtype):
            raise UserError(
                f"it holds {found.n_tokens} tokens x {found.shape} in {found.dtype}, "
                f"the document has {n_tokens} x {blocks.shape} in {dtype}"
            )
