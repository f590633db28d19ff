"""What one rank's processor can do, where it is not at hand: achieved rates, not peaks, with their sources."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cpmpi.cost.rates import Rates
from cpmpi.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One rank's share of a machine.

    Attributes:
        name: in words.
        source: where each figure comes from.
        matmul_flops, attention_flops: FLOP/s of large matrix products and of long attention, of one rank.
        memory_gb_per_s: at which weights, and keys for few queries, are read.
        memory_bytes: for weights, activations and keys.
        disk_gb_per_s: of a node's writing to, and reading from, the shared file system; an assumption to override.
        call_s: of a kernel call beside its work.
        machine: the node of `topology.machines` that it sits in.
        device: ``cuda`` or ``cpu``, which decides what type a job computes in by itself.
        float32_flops: FLOP/s of products and of attention in float32, where they are fewer than those above.
        program_bytes: of ``memory_bytes``, what the program itself takes; on a GPU it is not in the device's memory.
        merge_gb_per_s: as in `Rates`; None where it follows from ``memory_gb_per_s``.
    """

    name: str
    source: str
    matmul_flops: float
    attention_flops: float
    memory_gb_per_s: float
    memory_bytes: float
    disk_gb_per_s: float = 2.0
    call_s: float = 1e-5
    machine: str
    device: str = "cuda"
    float32_flops: float | None = None
    program_bytes: float = 0
    merge_gb_per_s: float | None = None

    @property
    def rates(self) -> Rates:
        """What the cost model needs of it."""
        return Rates(
            attention_flops=self.attention_flops, memory_gb_per_s=self.memory_gb_per_s, call_s=self.call_s,
            merge_gb_per_s=self.merge_gb_per_s, message_s=2e-5,
        )  # fmt: skip

    def computing_in(self, dtype: str) -> Hardware:
        """The same with its rates for this type."""
        if dtype != "float32" or self.float32_flops is None:
            return self
        matmul, attention = (min(rate, self.float32_flops) for rate in (self.matmul_flops, self.attention_flops))
        return replace(self, matmul_flops=matmul, attention_flops=attention)


HARDWARE = {
    "h100": Hardware(
        name="NVIDIA H100 SXM 80 GB",
        source="peak of 989 TFLOP/s dense bf16 (data sheet); matrix products at the 80% of it measured on an H200, "
        "whose chip is the same; attention 550: FlashAttention-3's causal forward at head dim 128 and 16k tokens "
        "(about 640, arXiv 2407.08608) less 15% for the blocks of a ring; memory 3.35 TB/s (data sheet) at 90%; "
        "float32 67 TFLOP/s (data sheet) at 80%",
        matmul_flops=790e12,
        attention_flops=550e12,
        memory_gb_per_s=3000,
        memory_bytes=80e9,
        float32_flops=53e12,
        machine="dgx-h100",
    ),
    "h200": Hardware(
        name="NVIDIA H200 SXM 141 GB",
        source="matrix products 790 TFLOP/s in bf16 and memory 4.3 TB/s, both measured; attention as for the H100, "
        "whose chip it shares; float32 67 TFLOP/s (data sheet) at 80%",
        matmul_flops=790e12,
        attention_flops=550e12,
        memory_gb_per_s=4300,
        memory_bytes=141e9,
        float32_flops=53e12,
        machine="dgx-h100",
    ),
    "a100": Hardware(
        name="NVIDIA A100 80 GB",
        source="peak of 312 TFLOP/s dense bf16 (data sheet), products at 80% of it; attention 190: causal forward of "
        "FlashAttention-2 at head dim 128 (about 190 to 200, arXiv 2307.08691); memory 1.94 TB/s (data sheet of the "
        "PCIe card) at 90%; float32 19.5 TFLOP/s (data sheet) at 80%",
        matmul_flops=250e12,
        attention_flops=190e12,
        memory_gb_per_s=1750,
        memory_bytes=80e9,
        float32_flops=15.6e12,
        machine="a100-pcie-4",
    ),
    "cpu": Hardware(
        name="16 cores of a two-socket AMD EPYC 7763 node",
        source="68 GFLOP/s a core in float32 for products and attention alike, measured on another processor with "
        "AVX-512; memory 204.8 GB/s a socket (data sheet: 8 channels of DDR4-3200) over 4 ranks, at 80%; 256 GB a node "
        "over 8 ranks; the program 0.43 GB, as a rank of the demo has it",
        matmul_flops=16 * 68e9,
        attention_flops=16 * 68e9,
        memory_gb_per_s=40,
        memory_bytes=32e9,
        call_s=4e-4,
        machine="cpu-2s",
        device="cpu",
        program_bytes=0.43e9,
    ),
}


def hardware(name: str) -> Hardware:
    """The hardware of this name.

    Raises:
        UserError: there is none; the choices are listed.
    """
    if name not in HARDWARE:
        raise UserError(f"unknown hardware {name!r}: choose one of {', '.join(HARDWARE)}, here")
    return HARDWARE[name]
