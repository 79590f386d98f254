"""All that defines a feedback matrix, as plain values: hashable, comparable, readable from a string."""

from __future__ import annotations

import json
import math
import operator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import torch

from .entries import default_nonzeros
from .kinds import FEEDBACK_KINDS, Kind

KINDS = tuple(name for name, kind in FEEDBACK_KINDS.items() if kind.make)
STORAGES = ("dense", "procedural")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class FeedbackSpec:
    """All that defines a feedback matrix, but for the entries of a given one (kind "matrix"). Hashable."""

    kind: str = "gaussian"
    storage: str = "dense"
    seed: int = 0
    dtype: torch.dtype = torch.float32
    normalize: bool = True
    gain: float = 1.0
    nonzeros: int | None = None
    _encoded: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, tuple(FEEDBACK_KINDS))
        check_choice("storage", self.storage, STORAGES)
        if self.kind not in KINDS and self.storage != "dense":
            raise ValueError(f"kind {self.kind!r} is a given U, which storage {self.storage!r} cannot make anew")
        check_dtype(self.dtype)
        self._set("seed", check_integer("seed", self.seed, 0, 2**64 - 1))
        self._set("gain", check_finite("gain", self.gain))
        self._set("nonzeros", self._checked_nonzeros())
        self._set("_encoded", json.dumps(self.to_dict(), separators=(",", ":")))

    def _set(self, name: str, value: object) -> None:
        """A field as a plain value of its type, whatever it was given as (a NumPy integer, say)."""
        object.__setattr__(self, name, value)

    def _checked_nonzeros(self) -> int | None:
        if self.nonzeros is None:
            return None
        if self.row.tile != "nonzeros":
            raise ValueError(f"nonzeros is for kind 'sparse', got nonzeros={self.nonzeros!r} for {self.kind!r}")
        return check_integer("nonzeros", self.nonzeros, 1)

    def __hash__(self) -> int:
        # A text knows its hash, and every launch is looked up by it.
        return hash(self._encoded)

    @property
    def row(self) -> Kind:
        """What the table of kinds says of this one."""
        return FEEDBACK_KINDS[self.kind]

    def scale(self, size: int, error_size: int) -> float:
        """The factor from U[:size] to B_i: gain / sqrt(size · error_size), or gain if not normalize."""
        return self.gain / math.sqrt(size * error_size) if self.normalize else self.gain

    def nonzeros_per_row(self, error_size: int) -> int:
        """The k of kind "sparse"; ValueError if it exceeds error_size."""
        nonzeros = self.nonzeros or default_nonzeros(error_size)
        if nonzeros > error_size:
            raise ValueError(f"nonzeros must be at most the error size {error_size}, got {nonzeros}")
        return nonzeros

    def to_dict(self) -> dict[str, Any]:
        """The fields as str, int, float, bool or None."""
        names = (item.name for item in fields(self) if item.init)
        values = {name: getattr(self, name) for name in names}
        return {**values, "dtype": str(self.dtype).removeprefix("torch.")}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FeedbackSpec:
        """The inverse of to_dict."""
        return cls(**{**values, "dtype": getattr(torch, values["dtype"])})

    def encode(self) -> str:
        """One line of JSON, for operators, whose arguments are tensors, numbers and strings."""
        return self._encoded

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> FeedbackSpec:
        """The inverse of encode."""
        return FeedbackSpec.from_dict(json.loads(text))


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
    wanted = f"{name} must be an integer of at least {least}" + (f" and at most {most}" if most else "")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{wanted}, got {value!r} ({type(value).__name__})") from None
    if isinstance(value, bool):
        raise TypeError(f"{wanted}, got {value!r} (bool)")
    if number < least or (most is not None and number > most):
        raise ValueError(f"{wanted}, got {value!r}")
    return number


def check_finite(name: str, value: Any) -> float:
    """``value`` as a float that float32 can hold."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, str) or not abs(number) <= torch.finfo(torch.float32).max:
        raise ValueError(f"{name} must be a finite number, got {value!r}")
    return number


def check_dtype(dtype: object) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
