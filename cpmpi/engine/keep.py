"""The keys and values of a document on their way to this rank's shard, while the document is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from cpmpi.comm.flight import DISK, Flight
from cpmpi.errors import UserError
from cpmpi.run.writer import ShardWriter


@dataclass(frozen=True, kw_only=True)
class Keeper:
    """Hands finished layers of a document to the writer.

    Attributes:
        document: its place in the run.
        writer: of this rank's shard.
        flight: records that this rank waits for its disk.
        broke: is told what cannot be written, where all ranks meet before the end.
    """

    document: int
    writer: ShardWriter
    flight: Flight
    broke: Callable[[UserError], None] = lambda _: None

    def keep(self, layer: int, k_TGD: torch.Tensor, v_TGE: torch.Tensor) -> None:
        """Have a layer written. An error is kept until all ranks meet: the others wait for this one till then."""
        k_TGD, v_TGE = k_TGD.cpu(), v_TGE.cpu()
        try:
            with self.flight.waits(DISK):
                self.writer.put(self.document, layer, k_TGD, v_TGE)
        except UserError as problem:
            self.broke(problem)

    def finish(self) -> int:
        """The digest of what is written, once it lasts.

        Raises:
            UserError: a layer could not be written.
        """
        with self.flight.waits(DISK):
            return self.writer.finish(self.document)
