"""Machine code is read as a person reads it."""

from __future__ import annotations

import pytest

from bench.predict import sass

# A loop over 0x20 … 0x70, left by the call at 0x50; 0x30 jumps ahead, and 0xa0 is the end of every listing.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P2 EXIT ;
.L_x_3:
        /*0020*/                   LDGSTS.E.BYPASS.128 [R9], [R2.64], P1 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
        /*0040*/                   FADD R20, R20, R21 ;
.L_x_1:
        /*0050*/               @P3 CALL.REL.NOINC `(.L_x_2) ;
        /*0060*/                   HMMA.16816.F32.BF16 R24, R12, R16, R24 ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   STG.E.128 [R2.64], R24 ;
        /*0090*/                   EXIT ;
.L_x_4:
        /*00a0*/                   BRA `(.L_x_4);
"""


def test_instructions_and_loops() -> None:
    code = sass.instructions(LISTING)
    assert [line.address for line in code] == list(range(0, 0xB0, 0x10))
    assert code[1] == sass.Instruction(0x10, "EXIT")
    assert {line.address: line.target for line in code if line.target is not None} == {
        0x30: 0x50, 0x70: 0x20, 0xA0: 0xA0,
    }  # fmt: skip
    (body,) = sass.loops(code)
    assert [line.address for line in body] == [0x20, 0x30, 0x40, 0x50, 0x60, 0x70]


@pytest.mark.parametrize(
    ("opcode", "name"),
    [
        ("IMAD.WIDE.U32", "32 x 32-bit products"),
        ("IMAD.MOV.U32", "other integer products and sums"),
        ("FFMA", "float products and sums"),
        ("LDGSTS.E.BYPASS.128", "memory and waiting"),
        ("EXIT", "other"),
    ],
)
def test_class_of_an_instruction(opcode: str, name: str) -> None:
    assert sass.class_of(opcode) == name
