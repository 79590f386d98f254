"""What NVIDIA says of its GPUs: limits of a multiprocessor by architecture, and the datasheet's rates of a card."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
RESERVED_SHARED = 1 * KIB
"""Bytes of shared memory that the driver takes from every program, from sm_80 on (CUDA Programming Guide)."""


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor has, and what a program may use of it. Shared memory in bytes.

    Source: CUDA Programming Guide, "Compute Capabilities", technical specifications by compute capability.
    """

    shared_of_program: int
    shared: int
    warps: int
    programs: int
    registers: int = 65536
    float_lanes: int = 128
    """float32 operations a clock (CUDA Programming Guide, "Throughput of Native Arithmetic Instructions")."""
    integer_lanes: int = 64
    """The same table: 32-bit integer products, and as many sums, shifts and logic; sm_120: from the RTX Blackwell
    whitepaper, which says that every float32 lane takes integers too."""


MULTIPROCESSORS = {
    80: Multiprocessor(163 * KIB, 164 * KIB, 64, 32, float_lanes=64),
    86: Multiprocessor(99 * KIB, 100 * KIB, 48, 16),
    89: Multiprocessor(99 * KIB, 100 * KIB, 48, 24),
    90: Multiprocessor(227 * KIB, 228 * KIB, 64, 32),
    100: Multiprocessor(227 * KIB, 228 * KIB, 64, 32),
    120: Multiprocessor(99 * KIB, 100 * KIB, 48, 24, integer_lanes=128),
}


@dataclass(frozen=True)
class Card:
    """Datasheet numbers of one card. Rates are peaks of dense products that sum in float32, operations a second."""

    name: str
    arch: int
    multiprocessors: int
    clock: float
    """Hz, at which the multiprocessors reach the rate of bf16."""
    bandwidth: float
    """Bytes a second, of memory."""
    half: float
    tf32: float
    ieee: float
    l2_bytes: float
    """A clock, from the whole L2 cache. The A100 whitepaper's; for the H100 and H200, of which none is published, the
    same; for GeForce cards, of which none is either, what all multiprocessors together can ask for."""
    source: str

    def rate(self, arithmetic: str) -> float:
        """Operations a second in "tf32" or "ieee"."""
        return {"tf32": self.tf32, "ieee": self.ieee}[arithmetic]


CARDS = (
    Card(
        "A100 SXM 80 GB",
        80,
        108,
        1.410e9,
        2039e9,
        312e12,
        156e12,
        19.5e12,
        5120,
        "NVIDIA A100 datasheet and whitepaper",
    ),
    Card(
        "RTX 3090",
        86,
        82,
        1.695e9,
        936e9,
        71e12,
        35.6e12,
        35.6e12,
        82 * 64,
        "NVIDIA Ampere GA102 whitepaper, appendix A",
    ),
    Card(
        "RTX 4090", 89, 128, 2.520e9, 1008e9, 165.2e12, 82.6e12, 82.6e12, 128 * 64, "NVIDIA Ada whitepaper, appendix A"
    ),
    Card(
        "H100 SXM", 90, 132, 1.830e9, 3352e9, 989.4e12, 494.7e12, 66.9e12, 5120, "NVIDIA H100 datasheet and whitepaper"
    ),
    Card("H200", 90, 132, 1.830e9, 4800e9, 989.4e12, 494.7e12, 66.9e12, 5120, "NVIDIA H200 datasheet"),
    Card(
        "RTX 5090",
        120,
        170,
        2.407e9,
        1792e9,
        209.5e12,
        104.8e12,
        104.8e12,
        170 * 64,
        "NVIDIA RTX Blackwell whitepaper, appendix",
    ),
)
