"""What a multiprocessor has, by architecture. Source: CUDA Programming Guide, "Compute Capabilities"."""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1024
RESERVED_SHARED = 1 * KIB
"""Bytes of shared memory that the driver takes from every program, from sm_80 on."""


@dataclass(frozen=True)
class Multiprocessor:
    """What a multiprocessor has, and what a program may use of it. Shared memory in bytes."""

    shared_of_program: int
    shared: int
    warps: int
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(163 * KIB, 164 * KIB, 64),
    86: Multiprocessor(99 * KIB, 100 * KIB, 48),
    89: Multiprocessor(99 * KIB, 100 * KIB, 48),
    90: Multiprocessor(227 * KIB, 228 * KIB, 64),
    100: Multiprocessor(227 * KIB, 228 * KIB, 64),
    120: Multiprocessor(99 * KIB, 100 * KIB, 48),
}
