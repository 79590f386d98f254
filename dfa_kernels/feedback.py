"""The fixed random feedback matrix: what it is, what is kept of it, and the projection of the error by it."""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import fastfood
from .entries import (
    default_nonzeros,
    fill,
    packed_signs,
    row_passes,
    sparse_entries,
    unpack_signs,
)
from .hadamard import without_autocast

KINDS = ("gaussian", "rademacher", "uniform", "sparse", "fastfood")
STORAGES = ("dense", "procedural")
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Kinds whose dense storage is U itself; "matrix" is a given one.
PLAIN_KINDS = ("gaussian", "uniform", "matrix")

Parts = list[Tensor]
Source = Callable[[range], Parts]
Piece = tuple[slice, Tensor]


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
        _check_choice("kind", self.kind, (*KINDS, "matrix"))
        _check_choice("storage", self.storage, STORAGES)
        if self.kind == "matrix" and self.storage != "dense":
            raise ValueError(f"kind 'matrix' is a given U, which storage {self.storage!r} cannot make anew")
        _check_integer("seed", self.seed, 0, 2**64 - 1)
        _check_dtype(self.dtype)
        if not isinstance(self.gain, (int, float)) or not math.isfinite(self.gain):
            raise ValueError(f"gain must be a finite number, got {self.gain!r}")
        self._check_nonzeros()
        object.__setattr__(self, "_encoded", json.dumps(self.to_dict(), separators=(",", ":")))

    def _check_nonzeros(self) -> None:
        if self.nonzeros is None:
            return
        if self.kind != "sparse":
            raise ValueError(f"nonzeros is for kind 'sparse', got nonzeros={self.nonzeros!r} for {self.kind!r}")
        _check_integer("nonzeros", self.nonzeros, 1)

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


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def _check_integer(name: str, value: object, least: int, most: int | None = None) -> int:
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


def _check_dtype(dtype: object) -> None:
    if dtype not in DTYPES:
        raise TypeError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")


def _row_unit(spec: FeedbackSpec, error_size: int) -> int:
    """Rows come in units of one, but those of fastfood in whole blocks."""
    return fastfood.block_rows(error_size) if spec.kind == "fastfood" else 1


def _generate(spec: FeedbackSpec, units: range, error_size: int, device: torch.device) -> Parts:
    """What defines these rows (or blocks) of U, as dense storage keeps it."""
    make = torch.ops.dfa_kernels.feedback_parts
    parts: Parts = make(spec.encode(), units.start, units.stop, error_size, device)
    return parts


# An operator, so that a compiler that meets it cannot fuse it into arithmetic with other last bits.
torch.library.define(
    "dfa_kernels::feedback_parts",
    "(str feedback, int start, int stop, int error_size, Device device) -> Tensor[]",
)


@torch.library.impl("dfa_kernels::feedback_parts", "CompositeExplicitAutograd")
@torch.inference_mode(False)  # What is made under inference mode may be kept for training.
def _feedback_parts(feedback: str, start: int, stop: int, error_size: int, device: torch.device) -> Parts:
    spec, units = FeedbackSpec.decode(feedback), range(start, stop)
    if spec.kind == "fastfood":
        return fastfood.fastfood_diagonals(spec.seed, units, error_size, device)
    if spec.kind == "sparse":
        nonzeros = spec.nonzeros_per_row(error_size)
        return list(sparse_entries(spec.seed, units, error_size, nonzeros, device))
    if spec.kind == "rademacher":
        return [packed_signs(spec.seed, units, error_size, device)]
    out = torch.empty(len(units), error_size, dtype=spec.dtype, device=device)
    return [fill(out, spec.kind, spec.seed, row=units.start)]


def _parts_fake(feedback: str, start: int, stop: int, error_size: int, device: torch.device) -> Parts:
    layouts = _layouts(FeedbackSpec.decode(feedback), error_size)
    return [torch.empty(stop - start, width, dtype=dtype, device=device) for width, dtype in layouts]


torch.library.register_fake("dfa_kernels::feedback_parts", _parts_fake)


def _layouts(spec: FeedbackSpec, error_size: int) -> list[tuple[int, torch.dtype]]:
    """Width and dtype of each part of a row (or block) of U."""
    if spec.kind == "fastfood":
        d = fastfood.block_rows(error_size)
        return [(d, torch.int8), (d, torch.int32), (d, torch.float32), (d, torch.float32)]
    if spec.kind == "sparse":
        nonzeros = spec.nonzeros_per_row(error_size)
        return [(nonzeros, torch.int32), (nonzeros, torch.int8)]
    if spec.kind == "rademacher":
        return [(-(-error_size // 32), torch.int32)]
    return [(error_size, spec.dtype)]


def _source(stored: Parts, spec: FeedbackSpec, error_size: int, device: torch.device) -> Source:
    if stored:
        return lambda units: [part[units.start : units.stop] for part in stored]
    return lambda units: _generate(spec, units, error_size, device)


def project_unscaled(error: Tensor, stored: Parts, spec: FeedbackSpec, size: int) -> Tensor:
    """error [b, E] times the transpose of U[:size]: [b, size], in spec.dtype, or in float64 for a float64
    error.

    stored: what Feedback.stored gives for at least `size` rows on the error's device, empty for procedural
    storage. U is never formed whole unless it is stored so. Not differentiable other than for a stored plain
    U.
    """
    dtype = torch.float64 if error.dtype == torch.float64 else spec.dtype
    if stored and spec.kind in PLAIN_KINDS:
        return error.to(dtype) @ stored[0][:size].to(dtype).T
    return _project_in_blocks(error, stored, spec, size, dtype)


@torch.no_grad()
def _project_in_blocks(error: Tensor, stored: Parts, spec: FeedbackSpec, size: int, dtype: torch.dtype) -> Tensor:
    out = torch.empty(error.shape[0], size, dtype=dtype, device=error.device)
    working = error.to(torch.promote_types(dtype, torch.float32))
    source = _source(stored, spec, error.shape[1], error.device)
    with without_autocast(error.device):
        for rows, product in _products(working, source, spec, size):
            out[:, rows] = product.T
    return out


def _products(error: Tensor, source: Source, spec: FeedbackSpec, size: int) -> Iterator[Piece]:
    """Pieces (rows r, U[r] errorᵀ) of the projection, of bounded size."""
    if spec.kind == "fastfood":
        yield from fastfood.fastfood_products(error, source, size)
        return
    multiply = _sparse_product if spec.kind == "sparse" else _block_product
    for rows in row_passes(range(size), _entries_per_row(spec, error), error.device):
        yield slice(rows.start, rows.stop), multiply(source(rows), error, spec)


def _entries_per_row(spec: FeedbackSpec, error: Tensor) -> int:
    batch, error_size = error.shape
    return max(batch, spec.nonzeros_per_row(error_size) if spec.kind == "sparse" else error_size)


def _block_product(parts: Parts, error: Tensor, spec: FeedbackSpec) -> Tensor:
    return _block(parts, error.shape[1]).to(error.dtype) @ error.T


def _block(parts: Parts, error_size: int) -> Tensor:
    return unpack_signs(parts[0], error_size) if parts[0].dtype == torch.int32 else parts[0]


def _sparse_product(parts: Parts, error: Tensor, spec: FeedbackSpec) -> Tensor:
    indices, signs = parts
    table = (error.T * _sparse_value(spec, error.shape[1])).contiguous()
    return F.embedding_bag(indices, table, mode="sum", per_sample_weights=signs.to(error.dtype))


def _sparse_value(spec: FeedbackSpec, error_size: int) -> Tensor:
    # Rounded to spec.dtype as every entry is, so that the projection and the matrix agree in any precision.
    return torch.tensor(math.sqrt(error_size / spec.nonzeros_per_row(error_size)), dtype=spec.dtype)


def _dense_blocks(spec: FeedbackSpec, size: int, error_size: int, device: torch.device) -> Iterator[Piece]:
    """Pieces (rows r, U[r]) of U, of bounded size."""
    source = _source([], spec, error_size, device)
    if spec.kind == "fastfood":
        identity = torch.eye(error_size, dtype=torch.promote_types(spec.dtype, torch.float32), device=device)
        yield from fastfood.fastfood_products(identity, source, size)
        return
    for rows in row_passes(range(size), error_size, device):
        parts = source(rows)
        block = _scatter(parts, spec, error_size) if spec.kind == "sparse" else _block(parts, error_size)
        yield slice(rows.start, rows.stop), block


def _scatter(parts: Parts, spec: FeedbackSpec, error_size: int) -> Tensor:
    indices, signs = parts
    values = signs.to(spec.dtype) * _sparse_value(spec, error_size)
    return values.new_zeros(indices.shape[0], error_size).scatter_(1, indices.long(), values)


class Feedback:
    """A fixed random feedback matrix U; layers of l units use B = gain · U[:l] / sqrt(l · E).

    kind: distribution of U's entries, all of unit variance: "gaussian", "rademacher" (±1), "uniform",
    "sparse" (`nonzeros` entries ±sqrt(E / nonzeros) a row, ceil(sqrt(E)) of them if None), or the structured
    "fastfood".
    storage: "dense" keeps U between steps (rademacher as sign bits, sparse as indices and signs, fastfood as
    its diagonals); "procedural" keeps the seed and makes the same U anew each time.
    seed: 0 to 2^64 - 1. dtype: of U and of the projection (of float64 errors: float64). device: where U lives
    and the projection is computed; None: where the error is. normalize=False leaves out the 1 / sqrt(l · E).

    Sources: one U for all layers, cut to each layer's size and scaled, is the paper's unified feedback;
    sparse: Li, Hastie, Church, KDD 2006; fastfood: Le, Sarlos, Smola, ICML 2013.
    """

    def __init__(
        self,
        kind: str = "gaussian",
        storage: str = "dense",
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        normalize: bool = True,
        gain: float = 1.0,
        nonzeros: int | None = None,
    ) -> None:
        if kind == "matrix":
            raise ValueError("kind 'matrix' comes from Feedback.from_matrix(U)")
        self.spec = FeedbackSpec(kind, storage, seed, dtype, normalize, gain, nonzeros)
        self.device = None if device is None else torch.device(device)
        self._given: Tensor | None = None
        self._kept: dict[tuple[int, torch.device], Parts] = {}

    @classmethod
    def from_matrix(
        cls,
        matrix: Any,
        *,
        normalize: bool = True,
        gain: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> Feedback:
        """Feedback by a copy of the given U: a floating tensor or array [rows, E], rows >= the widest layer.

        dtype, device: of the copy; U's own if None, and then projections are computed where the error is.
        """
        given = torch.as_tensor(matrix).detach()
        if not given.is_floating_point():
            raise TypeError(f"matrix must be floating, got dtype {given.dtype}")
        if given.dim() != 2 or 0 in given.shape:
            raise ValueError(f"matrix must have shape [rows >= 1, error size >= 1], got {list(given.shape)}")
        self = cls(device=device)
        self.spec = FeedbackSpec("matrix", dtype=dtype or given.dtype, normalize=normalize, gain=gain)
        place = self.device or given.device
        self._given = torch.empty(given.shape, dtype=self.spec.dtype, device=place).copy_(given)
        return self

    def stored(self, rows: int, error_size: int, device: torch.device | str) -> Parts:
        """What is kept between steps of at least `rows` rows of U, made when first asked for.

        Lives on self.device if given, else on `device`. Dense: [U]; rademacher: [bits]; sparse: [columns,
        signs];
        fastfood: [signs, permutation, gaussian, scaling] by blocks; procedural: []. Growing keeps every
        entry.
        """
        rows, error_size = self._check_shape(rows, error_size)
        if self.spec.storage == "procedural":
            return []
        place = self.device or torch.device(device)
        units = -(-rows // _row_unit(self.spec, error_size))
        if self._units_kept(error_size, place) < units:
            # Let go of the smaller one before the larger one is made.
            self._kept.pop((error_size, place), None)
            self._kept[error_size, place] = self._make(units, error_size, place)
        return self._kept[error_size, place]

    def _units_kept(self, error_size: int, device: torch.device) -> int:
        kept = self._kept.get((error_size, device))
        return kept[0].shape[0] if kept else 0

    def _make(self, units: int, error_size: int, device: torch.device) -> Parts:
        if self._given is not None:
            return [self._given.to(device)]
        return _generate(self.spec, range(units), error_size, device)

    @torch.no_grad()
    def matrix(self, size: int, error_size: int, *, device: torch.device | str | None = None) -> Tensor:
        """B_i, scaled: [size, error_size] in self.spec.dtype, on `device`, else on self.device, else on the
        CPU.

        Without a device, a given matrix answers on its own.
        """
        size, error_size = self._check_shape(size, error_size)
        scale = self.spec.scale(size, error_size)
        place = torch.device(device or self.device or "cpu")
        if self._given is not None:
            return (self._given[:size] * scale).to(device or self._given.device)
        out = torch.empty(size, error_size, dtype=self.spec.dtype, device=place)
        for rows, block in _dense_blocks(self.spec, size, error_size, place):
            out[rows] = block.to(out.dtype) * scale
        return out

    @torch.no_grad()
    def project(self, error: Tensor, size: int) -> Tensor:
        """error [..., E] times B_iᵀ: [..., size], in its dtype and on its device. Not differentiable."""
        if not isinstance(error, Tensor) or not error.is_floating_point():
            got = getattr(error, "dtype", type(error).__name__)
            raise TypeError(f"error must be a floating tensor, got {got}")
        if error.dim() == 0:
            raise ValueError("error must have shape [..., E], got a 0-d tensor")
        size, error_size = self._check_shape(size, error.shape[-1])
        rows = error.reshape(error.shape[:-1].numel(), error_size).to(self.device or error.device)
        with without_autocast(rows.device):
            result = project_unscaled(rows, self.stored(size, error_size, rows.device), self.spec, size)
        result = result.mul_(self.spec.scale(size, error_size))
        return result.to(error.device, error.dtype).view(*error.shape[:-1], size)

    def nbytes(self, size: int, error_size: int) -> int:
        """Bytes kept between steps for `size` rows; nothing is allocated to find out."""
        size, error_size = self._check_shape(size, error_size)
        if self.spec.storage == "procedural":
            return 0
        if self._given is not None:
            return self._given.nbytes
        units = -(-size // _row_unit(self.spec, error_size))
        return units * sum(width * dtype.itemsize for width, dtype in _layouts(self.spec, error_size))

    def _check_shape(self, size: int, error_size: int) -> tuple[int, int]:
        size, error_size = _check_integer("size", size, 1), _check_integer("error_size", error_size, 1)
        if self.spec.kind == "sparse":
            self.spec.nonzeros_per_row(error_size)
        if self._given is not None:
            _check_given(self._given, size, error_size)
        return size, error_size

    def state_dict(self) -> dict[str, Any]:
        """The specification in numbers and strings, with "matrix", U itself, if that was given.

        torch.load(weights_only=True) can read it.
        """
        state = self.spec.to_dict()
        return state if self._given is None else {**state, "matrix": self._given}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any], *, device: torch.device | str | None = None) -> Feedback:
        """The inverse of state_dict, with U on `device`."""
        if "matrix" in state:
            options = {name: state[name] for name in ("normalize", "gain")}
            return cls.from_matrix(state["matrix"], device=device, **options)
        self = cls(device=device)
        self.spec = FeedbackSpec.from_dict(state)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def __repr__(self) -> str:
        default = FeedbackSpec()
        options = {name: getattr(self.spec, name) for name in default.to_dict()}
        changed = [f"{name}={value!r}" for name, value in options.items() if value != getattr(default, name)]
        if self.device is not None:
            changed.append(f"device={str(self.device)!r}")
        if self._given is not None:
            changed[0] = f"<{self._given.shape[0]} x {self._given.shape[1]}>"
        return f"Feedback{'' if self._given is None else '.from_matrix'}({', '.join(changed)})"


def _check_given(given: Tensor, size: int, error_size: int) -> None:
    rows, columns = given.shape
    if error_size != columns:
        raise ValueError(f"error_size must be {columns}, the columns of the given matrix, got {error_size}")
    if size > rows:
        raise ValueError(f"size must be at most {rows}, the rows of the given matrix, got {size}")
