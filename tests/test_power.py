"""The power goes at any moment: what is found then opens, says nothing that is not so, and goes on as it must."""

from __future__ import annotations

import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from tests.disk import STRACE, Crash, disk_after, moments, record
from tests.forked import in_child
from tests.test_exact import save_llama

SHORT, LONG = 10, 250
LENGTHS = {"a": 60, "b": 90, "c": 40}
LAYERS = 4
# What was asked for: which documents, in which order.
COMMANDS = {"begin": "ab", "again": "ab", "list": "bca", "overwrite": "c"}
# What was said to be finished before, and not deleted since.
SAFE: dict[str, set[str]] = {"begin": set(), "again": {"a"}, "list": {"a", "b"}, "overwrite": set()}


class Made(NamedTuple):
    """What a document must be, to the bit."""

    logprobs: bytes
    last_hidden: bytes
    kv: tuple[bytes, ...]


def made(document: Any) -> Made:
    layers = range(len(document.kv_shapes))
    kv = tuple(one.tobytes() for layer in layers for one in document.kv(layer, raw=True))
    return Made(document.logprobs.tobytes(), document.last_hidden.tobytes(), kv)


class Job:
    """The documents and the model, beside a folder that is the disk."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        save_llama(folder / "model", 2, LAYERS)
        for name, length in LENGTHS.items():
            np.save(folder / f"{name}.npy", np.random.default_rng(length).integers(3, 90, length))
        self.truth = self.run("c" + "ab", folder / "truth")

    def run(self, names: str, output: Path, **more: Any) -> dict[str, Made]:
        """The job in this process, and what came of each document."""
        import cpmpi

        inputs = [self.folder / f"{name}.npy" for name in names]
        with cpmpi.prefill(
            model=self.folder / "model", inputs=inputs, output=output, checkpoint="0", chunk_tokens=32, **more
        ) as run:
            return {document.id[0]: made(document) for document in run.documents}

    def history(self, disk: Path) -> None:
        """A job that is stopped inside its second document, goes on, is given another list, and is begun anew."""
        output = disk / "new" / "run"
        self.begin(output)
        for name in ("again", "list", "overwrite"):
            (disk / f"mark-{name}").touch()
            assert self.run(COMMANDS[name], output, overwrite=name == "overwrite") == self.expected(name)

    def begin(self, output: Path) -> None:
        """A job that is told to stop inside its second document."""
        from cpmpi.engine.score import Engine
        from cpmpi.errors import Stopped

        gather, calls = Engine._gather_keys, []

        def stop_in_the_second(engine: Any, way: Any, layer: int, chunks: Any) -> Any:
            calls.append(layer)
            if calls.count(2) == 2 and layer == 2:
                signal.raise_signal(signal.SIGTERM)
            return gather(engine, way, layer, chunks)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Engine, "_gather_keys", stop_in_the_second)
            with pytest.raises(Stopped, match="is saved after layer"):
                self.run(COMMANDS["begin"], output)

    def expected(self, command: str) -> dict[str, Made]:
        return {name: self.truth[name] for name in COMMANDS[command]}

    def look(self, disk: Path, command: str) -> str:
        """Look at a disk as it was found, and go on; what is wrong, or nothing."""
        import cpmpi
        from cpmpi.run.verify import verify_run

        run = disk / "new" / "run"
        try:
            before = [line for line in verify_run(run).problems if ": not complete: " not in line]
            with cpmpi.open_run(run) as found:
                complete = [d for d in (*found.documents, *found.set_aside) if d.complete]
                before += [f"{d.id} is not what it must be" for d in complete if made(d) != self.truth[d.id[0]]]
                names = {d.id[0] for d in complete}
        except cpmpi.UserError as problem:
            before, names = [] if "no run here" in str(problem) else [str(problem)], set()
        if lost := SAFE[command] - names:
            before.append(f"finished documents are lost: {lost}")
        if command == "again" and "b" not in names and not list((run / "checkpoints").glob("*.json")):
            before.append("the checkpoint that was said to be saved is lost")
        if before:
            return f"before: {before}"
        if self.run(COMMANDS[command], run, overwrite=command == "overwrite") != self.expected(command):
            return "the result is not what it must be"
        left = map(str, (run / "checkpoints").glob("*"))
        return " ".join([*verify_run(run).problems, *left])


def run_disks(folder: Path, number: int, seed: int) -> list[str]:
    """Build so many disks, and say of each that is not as it must be what is wrong."""
    job = Job(folder)
    (folder / "disk").mkdir()
    recording = record(lambda: job.history(folder / "disk"), folder / "disk")
    wrong, chance = [], random.Random(seed)
    for moment in moments(recording, number, chance):
        marks = [name for name, at in recording.marks.items() if at < moment]
        command = marks[-1] if marks else "begin"
        with tempfile.TemporaryDirectory(dir=folder) as disk:
            crash: Crash = disk_after(recording, moment, chance.randrange(1 << 32), Path(disk))
            ended = in_child(job.look, Path(disk), command)
            bad = ended.signal or ended.error
            if problem := f"{bad}: {ended.text}" if bad else ended.value:
                wrong.append(f"{command}: {problem.replace(disk, '')}; {crash}")
    return wrong


def main(run: Callable[[Path, int, int], list[str]]) -> None:
    """``python -m MODULE DISKS [SEED]``: so many disks, and how many of them were wrong."""
    disks, chosen = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    with tempfile.TemporaryDirectory(prefix="cpmpi-power-") as place:
        faults = run(Path(place), disks, chosen)
    print("\n".join(faults))
    print(f"seed {chosen}: {disks} disks, {len(faults)} wrong")
    sys.exit(bool(faults))


@pytest.mark.skipif(STRACE is None, reason="no strace")
@pytest.mark.mpi(1)
@pytest.mark.parametrize("number", [SHORT, pytest.param(LONG, marks=pytest.mark.slow)])
def test_nothing_is_lost_and_nothing_is_wrong_after_the_power_went(tmp_path, number):
    """Other moments, and other parts of what was not synced, each time."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    wrong = run_disks(tmp_path, number, seed)
    assert not wrong, f"seed {seed}: {len(wrong)} of {number}:\n" + "\n".join(wrong[:10])


if __name__ == "__main__":
    main(run_disks)
