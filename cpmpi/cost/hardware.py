"""What one rank's processor can do, where it is not at hand: achieved rates, not peaks, with their sources."""

from __future__ import annotations

from dataclasses import dataclass

from cpmpi.cost.rates import Rates


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
        dtype: to compute in.
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
    dtype: str = "bfloat16"

    @property
    def rates(self) -> Rates:
        """What the cost model needs of it."""
        return Rates(
            attention_flops=self.attention_flops, memory_gb_per_s=self.memory_gb_per_s, call_s=self.call_s,
            message_s=2e-5,
        )  # fmt: skip


HARDWARE = {
    "h100": Hardware(
        name="NVIDIA H100 SXM 80 GB",
        source="peak of 989 TFLOP/s dense bf16 (data sheet); matrix products at the 80% of it measured on an H200, "
        "whose chip is the same; attention 550: FlashAttention-3's causal forward at head dim 128 and 16k tokens "
        "(about 640, arXiv 2407.08608) less 15% for the blocks of a ring; memory 3.35 TB/s (data sheet) at 90%",
        matmul_flops=790e12,
        attention_flops=550e12,
        memory_gb_per_s=3000,
        memory_bytes=80e9,
        machine="dgx-h100",
    ),
    "h200": Hardware(
        name="NVIDIA H200 SXM 141 GB",
        source="matrix products 790 TFLOP/s in bf16 and memory 4.3 TB/s, both measured; attention as for the H100, "
        "whose chip it shares",
        matmul_flops=790e12,
        attention_flops=550e12,
        memory_gb_per_s=4300,
        memory_bytes=141e9,
        machine="dgx-h100",
    ),
    "a100": Hardware(
        name="NVIDIA A100 80 GB",
        source="peak of 312 TFLOP/s dense bf16 (data sheet), products at 80% of it; attention 190: causal forward of "
        "FlashAttention-2 at head dim 128 (about 190 to 200, arXiv 2307.08691); memory 1.94 TB/s (data sheet of the "
        "PCIe card) at 90%",
        matmul_flops=250e12,
        attention_flops=190e12,
        memory_gb_per_s=1750,
        memory_bytes=80e9,
        machine="a100-pcie-4",
    ),
    "cpu": Hardware(
        name="16 cores of a two-socket AMD EPYC 7763 node",
        source="68 GFLOP/s a core in float32 for products and attention alike, measured on another processor with "
        "AVX-512; memory 204.8 GB/s a socket (data sheet: 8 channels of DDR4-3200) over 4 ranks, at 80%; 256 GB a node "
        "over 8 ranks",
        matmul_flops=16 * 68e9,
        attention_flops=16 * 68e9,
        memory_gb_per_s=40,
        memory_bytes=32e9,
        call_s=4e-4,
        machine="cpu-2s",
        dtype="float32",
    ),
}


def hardware(name: str) -> Hardware:
    """The hardware of this name.

    Raises:
        ValueError: there is none; the choices are listed.
    """
    if name not in HARDWARE:
        raise ValueError(f"unknown hardware {name!r}: choose one of {', '.join(HARDWARE)}")
    return HARDWARE[name]
