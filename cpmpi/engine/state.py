"""A job, in the four records that its preparation makes one after the other, each from those before it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from cpmpi.attention.grid import Grid
from cpmpi.attention.schedule import Schedule
from cpmpi.comm.carrier import Carrier
from cpmpi.comm.progress import Progress
from cpmpi.comm.ranks import Ranks
from cpmpi.cost.memory import Memory
from cpmpi.documents.read import InputDocument
from cpmpi.engine.keeping import LOGPROBS, Keeping
from cpmpi.engine.options import JobOptions, ModelOptions
from cpmpi.kernels.backend import Backend
from cpmpi.model.blocks import Blocks
from cpmpi.model.checkpoint import Checkpoint
from cpmpi.model.linear import Products
from cpmpi.model.probe import Layer
from cpmpi.model.tensor_parallel import Sharing
from cpmpi.model.weight_reader import WeightReader
from cpmpi.run.spec import RunSpec
from cpmpi.topology.describe import Topology


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What was given, read and checked.

    Attributes:
        documents: on rank 0 only: they may be large.
        longest: tokens of the longest one, with the one before it.
        keeping: what is scored and kept of each.
    """

    checkpoint: Checkpoint
    documents: tuple[InputDocument, ...]
    longest: int
    keeping: Keeping = LOGPROBS

    @property
    def together(self) -> int:
        """Tokens that go through the model together, at most."""
        return min(self.longest, self.keeping.scoring.context or self.longest)


@dataclass(frozen=True, kw_only=True)
class Model:
    """The whole model without weights, where and in which type it is computed, and what its layers will ask for."""

    device: torch.device
    dtype: torch.dtype
    skeleton: torch.nn.Module
    layers: tuple[Layer, ...]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where this rank stands, and what it holds there of the model.

    Attributes:
        ranks: numbered along the rings of the machine.
        carrier: of their messages.
        layers: with this rank's share of the heads.
        skeleton: the model without weights, of this rank's share.
        reader: of its weights.
        blocks: where a document can go on after a stop.
    """

    ranks: Ranks
    topology: Topology
    carrier: Carrier
    threads: int
    sharing: Sharing
    layers: tuple[Layer, ...]
    skeleton: torch.nn.Module
    reader: WeightReader
    blocks: Blocks

    @property
    def grid(self) -> Grid:
        """How ranks share heads and tokens."""
        return self.sharing.grid


@dataclass(frozen=True, kw_only=True)
class Decision:
    """How the job will be run.

    Attributes:
        schedule, reason: of the attention among the ranks of a head group, and why it was chosen.
        backends: the attention kernel of each layer.
        products: the library of linear layers.
        memory: what a rank needs, and whether weights are streamed.
    """

    schedule: Schedule
    reason: str
    backends: tuple[Backend, ...]
    products: Products
    memory: Memory


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A job on one rank that nothing was found against, of any kind."""

    options: ModelOptions
    inputs: Inputs
    model: Model
    place: Place
    decision: Decision
    progress: Progress

    @property
    def ranks(self) -> Ranks:
        """The ranks of the job."""
        return self.place.ranks


@dataclass(frozen=True, kw_only=True)
class Job(Prepared):
    """The main job: ``spec`` is what its run folder will hold."""

    options: JobOptions
    spec: RunSpec
