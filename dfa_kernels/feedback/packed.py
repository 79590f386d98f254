"""A feedback's state as one uint8 tensor: savers, casts and averages of a state dict expect tensors as its values."""

from __future__ import annotations

import json
import zlib
from typing import Any

import torch
from torch import Tensor

CHECKSUM = 4
# Long enough for any specification: all have one length then, so that one can be copied in place over another.
HEADER = 256


def pack(state: dict[str, Any]) -> Tensor:
    """``Feedback.state_dict()`` as uint8 [bytes] on the CPU: checksum, JSON filled up with blanks, then a given U."""
    given = state.get("matrix")
    matrix = torch.empty(0, dtype=torch.uint8, device="cpu")
    if given is not None:
        matrix = given.cpu().flatten().view(torch.uint8)
    text = json.dumps({**state, "matrix": None if given is None else list(given.shape)})
    header = text.encode().ljust(HEADER - CHECKSUM)
    checksum = zlib.crc32(matrix.numpy().data, zlib.crc32(header)).to_bytes(CHECKSUM, "little")
    return torch.cat([torch.tensor(list(checksum + header), dtype=torch.uint8, device="cpu"), matrix])


def unpack(packed: Tensor) -> dict[str, Any]:
    """The inverse of pack; of any numeric dtype (a cast, an average of equal ones), on any device.

    Raises:
        ValueError: bytes that pack did not make.
    """
    content = packed.detach().cpu().contiguous().flatten()
    if content.dtype != torch.uint8:
        content = content.float().round().to(torch.uint8)
    start, matrix = content[:HEADER].numpy().tobytes(), content[HEADER:]
    checksum, header = start[:CHECKSUM], start[CHECKSUM:]
    computed = zlib.crc32(matrix.numpy().data, zlib.crc32(header)).to_bytes(CHECKSUM, "little")
    if checksum != computed:
        raise ValueError(
            f"state: {content.numel()} bytes whose checksum is wrong, expected those of DFA.get_extra_state(), or an "
            "average of equal ones; leave _extra_state out of the state dict to keep the model's own feedback"
        )
    state: dict[str, Any] = json.loads(header)
    shape = state.pop("matrix")
    if shape is None:
        return state
    # A view in a wider dtype needs an aligned start, which a slice of a file may not have.
    return {**state, "matrix": matrix.clone().view(getattr(torch, state["dtype"])).view(shape)}
