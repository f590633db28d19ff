"""A checkpoint's model with cpmpi's attention, for tests that need no job around it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def load(folder: Path, dtype: Any) -> Any:
    import torch

    from cpmpi.model.checkpoint import Checkpoint

    checkpoint = Checkpoint(folder)
    reader = checkpoint.reader(checkpoint.skeleton(dtype), torch.device("cpu"))
    return checkpoint.weights(reader, stream=False).model
