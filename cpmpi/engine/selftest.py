"""Try what a job needs on the ranks of this launch: kernels, messages, every schedule, the disk, and a short job.

For a machine that is new to its user: each check ends well, fails with a line, or is left out with the reason. All of
it is collective, and a rank that does not answer is named as in a job (`cpmpi.comm.watchdog`).

Legend: T query tokens, S key tokens, H query heads, G KV heads, D key head dim, E value head dim, B bytes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import save_file

from cpmpi.attention.execute import Execution, Heads, Keys, Queries, Rule
from cpmpi.attention.layout import Layout, Piece
from cpmpi.attention.schedule import Schedule
from cpmpi.choices import SCHEDULES, TRANSPORTS
from cpmpi.comm import watchdog
from cpmpi.comm.carrier import choose_carrier
from cpmpi.comm.ranks import AgreedError, Ranks, node_name
from cpmpi.comm.transport import Transport
from cpmpi.cost.attention_bench import ordered, overlap
from cpmpi.cost.choose import schedule_on
from cpmpi.engine.api import prefill
from cpmpi.errors import UserError, some, told, told_to_the_user
from cpmpi.kernels.mask import Mask
from cpmpi.kernels.select import TOLERANCE, Shape, Trial, decide, named, passing, random_tensors, rates, try_all
from cpmpi.run.lock import only_writer
from cpmpi.run.reader import open_run
from cpmpi.run.verify import verify_run
from cpmpi.text import counted, seconds_text
from cpmpi.topology.describe import Topology
from cpmpi.topology.text import summary

if TYPE_CHECKING:
    from mpi4py import MPI

OK, FAILED, LEFT_OUT = "ok", "FAILED", "left out"
SIZES = (1, (1 << 12) + 1, 1 << 20, 1 << 23)  # bytes of messages
FILE_BYTES = 16 << 20  # that each rank writes
HANG_S = 60.0  # that a rank may keep the others waiting
SEEN_S = 30.0  # until a file must be seen on every node
HEADS = Heads(query_heads=4, kv_heads=2, key_dim=64, value_dim=64, dtype=torch.float32)
TOKENS = 1200  # of the short job
LOGPROB = 1e-4  # how far a log-probability of the short job may be from transformers': float32, two layers


class LeftOutError(AgreedError):
    """A check that this machine has nothing for, on all ranks alike."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """How a check ended: ``ok``, ``FAILED`` or ``left out``, with what was found, or why."""

    name: str
    outcome: str
    told: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the checks run.

    Attributes:
        ranks: of this launch.
        device: of this rank.
        topology: what was discovered.
        folder: on the file system that runs will lie on; emptied afterwards by whoever made it.
    """

    ranks: Ranks
    device: torch.device
    topology: Topology
    folder: Path

    def watched(self) -> AbstractContextManager[object]:
        """A watchdog on every rank, which names the one that does not answer. Collective."""
        return watchdog.watched(self.ranks, self.folder / "log", HANG_S, lambda line: print(line, file=sys.stderr))


def selftest(machine: Machine, tell: Callable[[Check], None]) -> list[Check]:
    """Make all checks, telling of each as it ends. Collective; all ranks return the same.

    Args:
        machine: where.
        tell: is given each check on its end.
    """
    found = []
    works: Sequence[tuple[str, Callable[[Machine], str]]] = (
        ("machine", machine_found), ("kernels", kernels_agree),
        *((f"attention over {kind}", partial(attention_agrees, kind=kind)) for kind in TRANSPORTS),
        ("files", files_are_seen), ("lock", lock_holds), ("short job", job_is_exact),
    )  # fmt: skip
    for name, work in works:
        begun = time.perf_counter()
        try:
            watch = nullcontext() if work is job_is_exact else machine.watched()  # a job has its own
            with watch:
                outcome, text = OK, work(machine)
        except LeftOutError as reason:
            outcome, text = LEFT_OUT, str(reason)
        except AgreedError as problem:
            outcome, text = FAILED, str(problem)
        mine = Check(name=name, outcome=outcome, told=text, seconds=round(time.perf_counter() - begun, 3))
        found.append(machine.ranks.on_root(lambda check: check, mine))
        tell(found[-1])
    return found


def machine_found(machine: Machine) -> str:
    """What was discovered; fails where links could not be measured."""
    if machine.topology.notes:
        raise AgreedError("; ".join(machine.topology.notes))
    return summary(machine.topology).splitlines()[0]


def kernels_agree(machine: Machine) -> str:
    """Every kernel against the float64 reference, on every rank; fails where a type has none that agrees."""
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if machine.device.type == "cuda" else [])]
    words = []
    for dtype in dtypes:
        for softcap in (None, 30.0):
            shape = Shape(dtype=dtype, query_heads=8, kv_heads=2, key_dim=64, value_dim=64, softcap=softcap)
            everyone = machine.ranks.allgather(machine.ranks.together(told, try_all, shape, machine.device))
            names = machine.ranks.together(_passing, shape, everyone)
            speeds = machine.ranks.allgather(rates(shape, machine.device, names))
            chosen = decide(shape, everyone, speeds)
            worst = max(trial.worst for trials in everyone for trial in trials if trial.name == chosen.name)
            label = str(dtype).removeprefix("torch.") + (" with soft cap" if softcap else "")
            words.append(f"{label} {chosen.name} ({worst:.0e} off)")
    return ", ".join(words)


def _passing(shape: Shape, everyone: Sequence[Sequence[Trial]]) -> tuple[str, ...]:
    with told_to_the_user(kinds=(RuntimeError,)):
        return passing(shape, everyone)


def attention_agrees(machine: Machine, kind: str) -> str:
    """Messages to both neighbours, then a layer's attention by every schedule against one process in float64."""
    ranks = machine.ranks
    device = torch.device("cpu") if kind == "gloo" else machine.device
    if ranks.size == 1 and kind != "mpi":
        raise LeftOutError("one rank has nobody to talk to")
    try:
        carrier = choose_carrier(ranks, machine.topology, device, kind)
    except AgreedError as reason:
        raise LeftOutError(str(reason)) from None
    comm = ordered(ranks.comm, machine.topology)
    wires = carrier.connect(comm, ranks.flight, ranks.numbers_of(comm))
    try:
        words = _attention(machine, comm, wires, device)
    except AgreedError:  # all ranks are here
        wires.close()
        raise
    wires.close()
    comm.Free()
    return ", ".join(words)


def _attention(machine: Machine, comm: MPI.Intracomm, wires: Transport, device: torch.device) -> list[str]:
    """What was found of messages, and of every schedule. Collective."""
    words = []
    if comm.size > 1:
        for size in SIZES:
            machine.ranks.together(_exchange, comm, wires, size, device)
        words.append(f"{SIZES[-1] / overlap(comm, wires, SIZES[-1], device, 3).move_s / 1e9:.3g} GB/s a rank")
    for kind in SCHEDULES:
        schedule = schedule_on(kind, machine.topology)
        off = max(_off(machine, comm, wires, device, schedule, rule) for rule in _rules(device))
        words.append(f"{kind} {off:.0e} off")
    return words


def _exchange(comm: MPI.Intracomm, wires: Transport, n_bytes: int, device: torch.device) -> None:
    """Send both neighbours their bytes, and compare what comes."""
    before, after = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    with wires.batch():
        arriving = [wires.receive(n_bytes, peer, channel, device) for channel, peer in enumerate((before, after))]
        leaving = [
            wires.send(_pattern(n_bytes, comm.rank, channel, device), peer, channel)
            for channel, peer in enumerate((after, before))
        ]
    arrived = [message.wait() for message in arriving]
    for message in leaving:
        message.wait()
    for channel, (peer, payload_B) in enumerate(zip((before, after), arrived, strict=True)):
        if not torch.equal(payload_B, _pattern(n_bytes, peer, channel, device)):
            raise UserError(f"a message of {n_bytes:,} bytes from position {peer} arrived with other bytes")


def _pattern(n_bytes: int, rank: int, channel: int, device: torch.device) -> torch.Tensor:
    """Bytes (B,) that nobody else sends."""
    return ((torch.arange(n_bytes, device=device) * 31 + 7 * rank + 3 * channel) % 251).to(torch.uint8)


def _rules(device: torch.device) -> Iterator[Rule]:
    """A plain causal mask; a window, documents, a soft cap and sinks, all at once."""
    yield Rule(mask=Mask(), scale=HEADS.key_dim**-0.5)
    sinks_H = torch.linspace(-1, 1, HEADS.query_heads, device=device)
    yield Rule(mask=Mask(window=90, documents=(160,)), scale=0.2, softcap=20.0, sinks_H=sinks_H)


def _off(
    machine: Machine, comm: MPI.Intracomm, wires: Transport, device: torch.device, schedule: Schedule, rule: Rule
) -> float:  # fmt: skip
    """How far the attention of random tokens is from that of one process, at the most. Collective.

    Raises:
        AgreedError: farther than float32 explains.
    """
    layout = Layout(n_tokens=300 + 17 * comm.size, world=comm.size, segments=2)
    pieces = layout.pieces(comm.rank)
    widths = (HEADS.query_heads, HEADS.kv_heads, HEADS.kv_heads)
    q_THD, k_SGD, v_SGE = random_tensors(device, HEADS.dtype, *((layout.n_tokens, h, HEADS.key_dim) for h in widths))
    keys = Keys.empty(pieces, HEADS, device)
    for own, all_of_it in ((keys.k_SGD, k_SGD), (keys.v_SGE, v_SGE)):
        own.copy_(_rows(all_of_it, pieces))
    ours_THE = Execution(
        rank=comm.rank, program=schedule.program(comm.rank), transport=wires, backend=named("blocked"), heads=HEADS,
        rule=rule, query_layout=layout, key_layouts=(layout,), device=device, flight=machine.ranks.flight,
    ).run(Queries(tuple((p.start, _rows(q_THD, [p])) for p in pieces)), keys)  # fmt: skip
    truth = named("reference").attend(
        *(x.double() for x in (q_THD, k_SGD, v_SGE)), q_start=0, k_start=0, mask=rule.mask, scale=rule.scale,
        softcap=rule.softcap,
    )  # fmt: skip
    assert truth is not None
    out_THE, lse_TH = truth
    if rule.sinks_H is not None:  # a sink takes its share of the weights
        out_THE = out_THE * torch.sigmoid(lse_TH - rule.sinks_H)[..., None]
    off_THE = (ours_THE.double() - _rows(out_THE, pieces)).abs()
    everyone = machine.ranks.allgather(float(off_THE.max()) if off_THE.numel() else 0.0)
    wrong = [
        f"{value:.1e} on rank {rank}" for rank, value in enumerate(everyone) if not value <= TOLERANCE[HEADS.dtype]
    ]
    if wrong:  # NaN among them
        raise AgreedError(f"{schedule.kind}: off from one process by {some(wrong)}")
    return max(everyone)


def _rows(tokens_THD: torch.Tensor, pieces: Sequence[Piece]) -> torch.Tensor:
    return torch.cat([tokens_THD[p.start : p.start + p.size] for p in pieces] or [tokens_THD[:0]])


def files_are_seen(machine: Machine) -> str:
    """Each rank writes, syncs and renames a file, and reads that of the next rank, which may be on another node."""
    ranks, folder = machine.ranks, machine.folder
    begun = time.perf_counter()
    ranks.together(_write, folder, ranks.rank)
    took_s = max(ranks.allgather(time.perf_counter() - begun))
    ranks.comm.Barrier()
    begun = time.perf_counter()
    ranks.together(_read, folder, (ranks.rank + 1) % ranks.size)
    seen_s = max(ranks.allgather(time.perf_counter() - begun))
    return (
        f"{counted(ranks.size, 'file')} of {FILE_BYTES >> 20} MiB synced in {seconds_text(took_s)}, "
        f"{ranks.size * FILE_BYTES / took_s / 1e9:.3g} GB/s together; read by the next rank in {seconds_text(seen_s)}"
    )


def _content(rank: int) -> bytes:
    return np.random.default_rng(rank).bytes(FILE_BYTES)


def _write(folder: Path, rank: int) -> None:
    unnamed = folder / f"rank-{rank}.part"
    with unnamed.open("wb") as file:
        file.write(_content(rank))
        file.flush()
        os.fsync(file.fileno())
    unnamed.rename(folder / f"rank-{rank}")


def _read(folder: Path, rank: int) -> None:
    """Compare a rank's file, which a network file system may show some seconds after its name was given."""
    path, until = folder / f"rank-{rank}", time.monotonic() + SEEN_S
    while not path.exists():
        if time.monotonic() > until:
            raise UserError(
                f"{path}: written by rank {rank}, not seen on {node_name()} after {SEEN_S:.0f} s; is it shared?"
            )
        time.sleep(0.1)
    if path.read_bytes() != _content(rank):
        raise UserError(f"{path}: read on {node_name()} with other bytes than rank {rank} wrote")


def lock_holds(machine: Machine) -> str:
    """The lock by which a run has one writer: taken by rank 0, refused to every other rank meanwhile."""
    ranks, run = machine.ranks, machine.folder / "locked"
    with ExitStack() as held:
        ranks.on_root(held.enter_context, only_writer(run))
        ranks.together(_refused, run, ranks.is_root)
        ranks.comm.Barrier()
    if ranks.size == 1:
        raise LeftOutError("one rank has nobody to lock out")
    return f"held by rank 0, refused to {counted(ranks.size - 1, 'other rank')}"


def _refused(run: Path, owner: bool) -> None:
    if owner:
        return
    try:
        with only_writer(run):
            pass
    except UserError:
        return
    raise UserError(f"{run}: took the lock that rank 0 holds; without locks two jobs could write one run")


def job_is_exact(machine: Machine) -> str:
    """A small random model's prefill on all ranks: the run verifies, its numbers are transformers' of one process."""
    ranks, folder = machine.ranks, machine.folder
    model, document, run = folder / "model", folder / "document.npy", folder / "run"
    ranks.on_root(_make_model, model, document)
    begun = time.perf_counter()
    prefill(model=model, inputs=document, output=run, device=machine.device.type, kv_dtype="float32").close()
    took_s = time.perf_counter() - begun
    off = ranks.on_root(_compare, document, run)
    return f"{TOKENS:,} tokens in {seconds_text(took_s)}, verified; log-probabilities {off:.0e} off transformers' own"


def _model() -> Any:
    """A Llama of two layers with random weights, the same each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=TOKENS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def _make_model(folder: Path, document: Path) -> None:
    """The model as a checkpoint, and a document of random tokens."""
    model = _model()
    model.config.save_pretrained(folder)
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    np.save(document, np.random.default_rng(0).integers(3, model.config.vocab_size, TOKENS))


def _compare(document: Path, run: Path) -> float:
    """How far the run's log-probabilities are from those of transformers, at the most.

    Raises:
        UserError: farther than float32 explains, or the run does not verify.
    """
    if problems := verify_run(run).problems:
        raise UserError(f"{run} does not verify: {some(problems, 2)}")
    ids_T = torch.from_numpy(np.load(document))
    with torch.inference_mode():
        logits_TV = _model()(ids_T[None]).logits[0]
    truth_T = logits_TV[:-1].double().log_softmax(-1).gather(1, ids_T[1:, None])[:, 0]
    with open_run(run) as finished:
        ours_T = torch.from_numpy(np.asarray(finished.documents[0].logprobs[1:])).double()
    off = float((ours_T - truth_T).abs().max())
    if not off <= LOGPROB:
        raise UserError(f"log-probabilities are off from transformers' in one process by {off:.1e}")
    return off
