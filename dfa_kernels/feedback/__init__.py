"""The fixed random feedback matrix that a network learns with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..autocast import without_autocast
from .free_memory import free_bytes
from .kinds import Parts
from .projection import dense_blocks, generate, project, units_for
from .spec import KINDS, FeedbackSpec, check_integer


class Feedback:
    """A fixed random feedback matrix U; layers of l units use B = gain · U[:l] / sqrt(l · E).

    kind: distribution of U's entries, all of unit variance: "gaussian", "rademacher" (±1), "uniform",
    "sparse" (`nonzeros` entries ±sqrt(E / nonzeros) a row, ceil(sqrt(E)) of them if None), or the structured
    "fastfood".
    storage: "dense" keeps U between steps (rademacher as sign bits, sparse as indices and signs, fastfood as
    its diagonals); "procedural" keeps the seed and makes the same U anew each time. What dense storage keeps is
    the same to the last bit on every device and in the kernels, and so is U but for Fastfood's, a product.
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

        Lives on self.device if given, else on `device`. Dense: [U]; rademacher: [bits]; sparse: [columns, signs];
        fastfood: [signs, permutation, gaussian, scaling] by blocks; procedural: []. Growing keeps every entry.
        """
        place = self.device or torch.device(device)
        kept = self.kept(error_size, place)
        if kept is not None and type(rows) is int and 1 <= units_for(self.spec, rows, error_size) <= kept[0].shape[0]:
            return kept
        rows, error_size = self._check_shape(rows, error_size)
        if self.spec.storage == "procedural":
            return []
        self._check_room(rows, error_size, place, given_back=kept or [])
        # Let go of the smaller one before the larger one is made.
        kept = None
        self._kept.pop((error_size, place), None)
        made = self._kept[error_size, place] = self._make(units_for(self.spec, rows, error_size), error_size, place)
        return made

    def kept(self, error_size: int, device: torch.device) -> Parts | None:
        """What is kept already, as `stored` hands it out; it tells nothing of how many rows that is."""
        return self._kept.get((error_size, self.device or device))

    def _check_room(self, rows: int, error_size: int, device: torch.device, given_back: Parts) -> None:
        """torch.OutOfMemoryError, before anything is allocated, if that many rows of U do not fit on the device.

        given_back: what comes free before these are needed.
        """
        if torch.compiler.is_compiling() or self._is_given_on(device):
            return
        wanted, free = self.nbytes(rows, error_size), free_bytes(device)
        if free is None:
            return
        free += sum(part.nbytes for part in given_back)
        if wanted <= free:
            return
        asked = f"feedback: {rows} x {error_size} of {self.spec.kind!r} need {_size(wanted)} on {device}, "
        asked += f"where {_size(free)} are free"
        if self._given is not None:
            raise torch.OutOfMemoryError(f"{asked}; from_matrix(U, device=...) projects on another device")
        others = {kind: Feedback(kind, dtype=self.spec.dtype).nbytes(rows, error_size) for kind in KINDS}
        fitting = [f"{kind!r} ({_size(n)})" for kind, n in others.items() if n <= free]
        raise torch.OutOfMemoryError(
            f"{asked}; storage='procedural' keeps only the seed, for any kind"
            + (f", and these kinds would fit: {', '.join(fitting)}" if fitting else "")
        )

    def _is_given_on(self, device: torch.device) -> bool:
        # "cuda" is the current one of them: a tensor there says which.
        return self._given is not None and self._given.device == torch.empty(0, device=device).device

    def _make(self, units: int, error_size: int, device: torch.device) -> Parts:
        if self._given is not None:
            return [self._given.to(device)]
        return generate(self.spec, range(units), error_size, device)

    @torch.no_grad()
    def matrix(self, size: int, error_size: int, *, device: torch.device | str | None = None) -> Tensor:
        """B_i, scaled: [size, error_size] in self.spec.dtype, on `device`, else on self.device, else on the CPU.

        Without a device, a given matrix answers on its own.
        """
        size, error_size = self._check_shape(size, error_size)
        scale = self.spec.scale(size, error_size)
        place = torch.device(device or self.device or "cpu")
        if self._given is not None:
            return (self._given[:size] * scale).to(device or self._given.device)
        out = torch.empty(size, error_size, dtype=self.spec.dtype, device=place)
        for rows, columns, block in dense_blocks(self.spec, size, error_size, place):
            out[rows, columns] = block.to(out.dtype) * scale
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
            result = project(rows, self.stored(size, error_size, rows.device), self.spec, size)
        return result.to(error.device, error.dtype).view(*error.shape[:-1], size)

    def nbytes(self, size: int, error_size: int) -> int:
        """Bytes kept between steps for `size` rows; nothing is allocated to find out."""
        size, error_size = self._check_shape(size, error_size)
        if self.spec.storage == "procedural":
            return 0
        if self._given is not None:
            return self._given.nbytes
        unit = sum(width * dtype.itemsize for width, dtype in self.spec.row.layout(self.spec, error_size))
        return units_for(self.spec, size, error_size) * unit

    def _check_shape(self, size: int, error_size: int) -> tuple[int, int]:
        size, error_size = check_integer("size", size, 1), check_integer("error_size", error_size, 1)
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


def _size(count: int) -> str:
    """Bytes, for people."""
    if count < 1e5:
        return f"{count} bytes"
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _check_given(given: Tensor, size: int, error_size: int) -> None:
    rows, columns = given.shape
    if error_size != columns:
        raise ValueError(f"error_size must be {columns}, the columns of the given matrix, got {error_size}")
    if size > rows:
        raise ValueError(f"size must be at most {rows}, the rows of the given matrix, got {size}")
