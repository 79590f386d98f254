"""`GraphedStep`: a whole training step as one CUDA graph, so that the device never waits for Python."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter, is_
from typing import Any

import torch
from torch import Tensor, nn

from ._torch_internals import cuda_matmul_precision, tensors_by_name
from .cuda_capture import CudaCapture, WaitingError
from .optim import FusedOptimizer
from .training_state import TrainingState
from .wrapper import DFA

logger = logging.getLogger("dfa_kernels")

WARM_UP = 3
"""Steps before a capture, which compile kernels and fill caches; the last one shows whether anything waits."""
MOST_GRAPHS = 8
"""Batches of so many shapes, modes and option values are captured; what else comes runs eagerly."""
_training, _requires_grad = attrgetter("training"), attrgetter("requires_grad")


class GraphedStep:
    """A training step, captured once and replayed: zero_grad, forward, loss, backward and the optimizer's step.

        step = dfa_kernels.GraphedStep(model, optimizer, F.cross_entropy, x, y)
        for x, y in batches:
            loss = step(x, y)

    The first call is step one: what the warm-up changes (parameters, buffers, the optimizer's and the scaler's state,
    random numbers) is put back. Steps give what eager ones give; each draws dropout masks of its own. Batches of
    another shape, a switch to or from `eval()` or `backprop()`, layers frozen since, and changed options of an
    optimizer that has them baked in are captured on their own. Gradients are gone after a step. `state_dict()` of all
    that is trained is as without it.

    On a CPU, or where a step cannot be captured, the same steps run eagerly, and the log says why.

    Args:
        model: a `DFA`, or any other module, called with a batch alone.
        optimizer: of this package with ``capturable=True``, whose options may all be changed, or of torch.optim; there
            capturable=True where it is an option. torch's SGD follows a learning rate if that is a tensor on the device
            and fused=True.
        loss_fn: (output, y) → the loss, a scalar, as its mean over the batch. What Python computes in it, in the model
            and in hooks is computed once for all replays.
        x, y: a batch like those to come, tensors on the model's device.
        amp_dtype: of autocast around the model and the loss; None: without.
        scaler: a GradScaler, which amp_dtype float16 needs, for optimizers of torch.optim with fused=True.
        micro_batches: the batch goes through the model in so many parts, whose gradients add up; each part's loss
            counts by its share of the rows.

    Raises:
        TypeError, ValueError: arguments that no step can be made of, as their messages say.
        RuntimeError: at a call, if tensors of the model or the optimizer are elsewhere in memory than when a graph was
            captured.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss_fn: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        y: Tensor,
        *,
        amp_dtype: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        micro_batches: int = 1,
    ) -> None:
        _check_types(model, optimizer, amp_dtype, scaler, x, y)
        if type(micro_batches) is not int or micro_batches < 1:
            raise ValueError(f"micro_batches: got {micro_batches!r}, expected an integer of at least 1")
        self.model, self.optimizer, self.loss_fn = model, optimizer, loss_fn
        self.amp_dtype, self.scaler, self.micro_batches = amp_dtype, scaler, micro_batches
        _check_trains(model, optimizer)
        self.device = _one_device(model, optimizer)
        self._dtypes = x.dtype, y.dtype
        self._check_batch(x, y)
        self._modules, self._parameters = list(model.modules()), list(model.parameters())
        self._dfa_modules = [module for module in self._modules if isinstance(module, DFA)]
        self._graphs: dict[Any, _Graph] = {}
        self._warm: Any = None
        self._lacks_state = False
        self._refused = False
        self._structure = _Structure(model)
        self._held: _Held | None = None
        self._capture = capture_on(self.device)
        if self._capture is None:
            logger.info(
                "GraphedStep: steps run eagerly: CUDA graphs need a CUDA device, the model is on %s", self.device
            )
            return
        _check_capturable(optimizer, scaler)
        self._warm_up(self._capture, x, y)

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step on the batch; its loss, a scalar on the device, which nobody has waited for."""
        self._check_batch(x, y)
        capture = self._capture
        if capture is None:
            return self._step(x, y)
        if isinstance(self.optimizer, FusedOptimizer):
            self.optimizer.refresh()
        self._structure.check()
        if self._held is not None:
            self._held.check()
        key = self._key(x, y)
        graph = self._graphs.get(key)
        if graph is None:
            graph = self._new_graph(capture, key, x, y)
        if graph is None:
            return capture.run(lambda: self._step(x, y))
        graph.x.copy_(x, non_blocking=True)
        graph.y.copy_(y, non_blocking=True)
        graph.replay()
        return graph.loss.clone()

    def _step(self, x: Tensor, y: Tensor) -> Tensor:
        self._drop_gradients()
        losses = [self._backward(*part) for part in self._parts(x, y)]
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        # Those of a graph lie in its own memory, where later replays work.
        self._drop_gradients()
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum()

    def _drop_gradients(self) -> None:
        """Also of parameters that the optimizer does not have."""
        self.optimizer.zero_grad()
        self.model.zero_grad()

    def _parts(self, x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Each part of the batch, and its share of the rows."""
        parts = zip(x.tensor_split(self.micro_batches), y.tensor_split(self.micro_batches), strict=True)
        for part_x, part_y in parts if self.micro_batches > 1 else [(x, y)]:
            yield part_x, part_y, len(part_x) / len(x) if self.micro_batches > 1 else 1.0

    @torch.enable_grad()
    def _backward(self, x: Tensor, y: Tensor, share: float) -> Tensor:
        # A cache of casts would outlive a capture.
        with torch.autocast(self.device.type, self.amp_dtype, self.amp_dtype is not None, cache_enabled=False):
            loss = self.loss_fn(self.model(x), y)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn: got {got}, expected a scalar tensor, the batch's mean loss for example")
        if share != 1:
            loss = loss * share
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        return loss.detach()

    def _new_graph(self, capture: CudaCapture, key: Any, x: Tensor, y: Tensor) -> _Graph | None:
        """The graph for such a batch, captured; None where this step has to run eagerly."""
        if len(self._graphs) == MOST_GRAPHS:
            self._refuse_more()
            return None
        if key != self._warm and not self._warm_up(capture, x, y):
            return None
        if self._lacks_state:
            # State that it makes in its first step would be made anew at each replay.
            self._lacks_state = False
            return None
        if isinstance(self.optimizer, FusedOptimizer):
            self.optimizer.refresh()
        kept: list[Any] = [[*module.feedback._kept.values()] for module in self._dfa_modules]
        if isinstance(self.optimizer, FusedOptimizer):
            kept.append(self.optimizer._on_device)
        static_x, static_y = x.detach().clone(), y.detach().clone()
        replay, loss = capture.record(lambda: self._step(static_x, static_y))
        graph = self._graphs[key] = _Graph(static_x, static_y, replay, loss, kept)
        self._held = _Held(self.model, self.optimizer)
        return graph

    def _warm_up(self, capture: CudaCapture, x: Tensor, y: Tensor) -> bool:
        """Runs some steps and puts back what they changed. Whether such a step can be captured."""
        before, random = TrainingState(self.model, self.optimizer, self.scaler), capture.random_state()
        try:
            with warnings.catch_warnings():
                # torch.optim wonders at steps of a capturable optimizer that are not captured.
                warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
                for _ in range(WARM_UP - 1):
                    capture.run(lambda: self._step(x, y))
                capture.run_without_waiting(lambda: self._step(x, y))
        except WaitingError as error:
            self._give_up(str(error))
        finally:
            before.restore()
            capture.set_random_state(random)
        self._lacks_state |= before.lost_state
        if before.replaced_tensors:
            self._give_up("the model replaces its own parameters or buffers, which a graph would do only once")
        self._warm = self._key(x, y)
        return self._capture is not None

    def _give_up(self, why: str) -> None:
        self._capture = None
        logger.warning("GraphedStep: steps run eagerly: %s", why)

    def _refuse_more(self) -> None:
        if not self._refused:
            self._refused = True
            logger.warning(
                "GraphedStep: %d graphs are captured, other steps run eagerly: batches have many shapes, or options of "
                "the optimizer change that are baked into graphs; give its learning rate as a tensor on the device",
                MOST_GRAPHS,
            )

    def _key(self, x: Tensor, y: Tensor) -> Any:
        """All that a graph is captured for: another one is needed where any of it differs."""
        modes, learning = tuple(map(_training, self._modules)), tuple(map(_requires_grad, self._parameters))
        rules = tuple([(module._backprop, module.feedback) for module in self._dfa_modules])
        options = _baked_options(self.optimizer), _baked_options_of(self.scaler), cuda_matmul_precision()
        return x.shape, y.shape, modes, learning, rules, options

    def _check_batch(self, x: Tensor, y: Tensor) -> None:
        for name, tensor, dtype in (("x", x, self._dtypes[0]), ("y", y, self._dtypes[1])):
            if tensor.device != self.device:
                raise ValueError(f"{name}: got a batch on {tensor.device}, expected {self.device}, where the model is")
            if tensor.dtype != dtype:
                raise ValueError(f"{name}: got {tensor.dtype}, expected {dtype}, the first batch's")
        if self.micro_batches > 1 and not len(x) == len(y) >= self.micro_batches:
            raise ValueError(
                f"x, y: got {len(x)} and {len(y)} rows, expected as many in both, and a row at least for each of "
                f"{self.micro_batches} micro_batches"
            )


class _Structure:
    """The modules of a model; looked up in each step, so what is called for each of them is C."""

    def __init__(self, model: nn.Module) -> None:
        inside = [module._modules for module in model.modules()]
        self._children = [(modules, [*modules.values()]) for modules in inside if modules]
        self._childless = [modules for modules in inside if not modules]

    def check(self) -> None:
        """RuntimeError if they are others by now."""
        if any(self._childless) or any([[*modules.values()] != children for modules, children in self._children]):
            raise RuntimeError(
                "GraphedStep: modules of the model were replaced, added or removed since it was made, which knows "
                "those before; make a new GraphedStep"
            )


class _Held:
    """Where graphs find what they train, when the last of them was captured: who holds it, and its address.

    As for the modules, what is called for each tensor is C.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        named = tensors_by_name(model)
        self._holders, self._names = [holder for holder, _, _ in named], [name for _, name, _ in named]
        own = [(p, n, t) for p, state in optimizer.state.items() for n, t in state.items() if isinstance(t, Tensor)]
        self._of_optimizer = [(p, name) for p, name, _ in own]
        self._tensors = [tensor for _, _, tensor in (*named, *own)]
        self._addresses = [*map(Tensor.data_ptr, self._tensors)]

    def check(self) -> None:
        """RuntimeError if anything is elsewhere by now."""
        now = [*map(dict.get, self._holders, self._names)]
        state = self._optimizer.state
        now += [state.get(p, {}).get(name) for p, name in self._of_optimizer]
        if not all(map(is_, now, self._tensors)) or [*map(Tensor.data_ptr, self._tensors)] != self._addresses:
            self._refuse_moved(now)

    def _refuse_moved(self, now: list[Any]) -> None:
        whose = [f"model's {name!r}" for name in self._names]
        whose += [f"optimizer's {name!r}" for _, name in self._of_optimizer]
        what, tensor = next(
            (what, tensor)
            for what, found, tensor, address in zip(whose, now, self._tensors, self._addresses, strict=True)
            if found is not tensor or tensor.data_ptr() != address
        )
        raise RuntimeError(
            f"GraphedStep: the {what}, of shape {tuple(tensor.shape)}, was moved, cast, replaced or loaded anew since "
            "a graph was captured, which knows where it was; make a new GraphedStep"
        )


@dataclass
class _Graph:
    """A captured step: the batch that it reads, its loss, and what else it reads that somebody might free."""

    x: Tensor
    y: Tensor
    replay: Callable[[], None]
    loss: Tensor
    kept: list[Any]


def capture_on(device: torch.device) -> CudaCapture | None:
    """What captures on this device, if anything does."""
    return CudaCapture(device) if device.type == "cuda" else None


def _baked_options(optimizer: torch.optim.Optimizer) -> tuple[Any, ...]:
    """Those that a graph has as they are when it is captured."""
    if isinstance(optimizer, FusedOptimizer):
        return optimizer.baked_options()
    return tuple([(n, _baked(v)) for group in optimizer.param_groups for n, v in group.items() if n != "params"])


def _baked_options_of(scaler: torch.amp.GradScaler | None) -> tuple[float, ...]:
    if scaler is None:
        return ()
    return scaler.get_growth_factor(), scaler.get_backoff_factor(), scaler.get_growth_interval()


def _baked(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.data_ptr() if value.device.type != "cpu" else tuple(value.flatten().tolist())
    return tuple(map(_baked, value)) if isinstance(value, (list, tuple)) else value


def _check_types(
    model: nn.Module, optimizer: torch.optim.Optimizer, amp_dtype: torch.dtype | None, scaler: Any, x: Tensor, y: Tensor
) -> None:
    expected = {
        "model": (model, nn.Module),
        "optimizer": (optimizer, torch.optim.Optimizer),
        "x": (x, Tensor),
        "y": (y, Tensor),
    }
    for name, (value, kind) in expected.items():
        if not isinstance(value, kind):
            raise TypeError(f"{name}: got {type(value).__name__}, expected a {kind.__module__}.{kind.__qualname__}")
    if amp_dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp_dtype: got {amp_dtype}, expected torch.bfloat16, torch.float16 or None")
    if amp_dtype == torch.float16 and scaler is None:
        raise ValueError(
            "amp_dtype: got torch.float16 without a scaler, so that small gradients would be lost; expected "
            "scaler=torch.amp.GradScaler(), or torch.bfloat16"
        )


def _check_trains(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError("optimizer: it has none of the model's parameters, so its steps would train nothing")


def _one_device(model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.device:
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    devices: set[torch.device] = {tensor.device for tensor in (*model.parameters(), *model.buffers(), *trained)}
    if len(devices) != 1:
        raise ValueError(f"model: its tensors are on {sorted(map(str, devices))}, expected one device")
    return devices.pop()


def _check_capturable(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None) -> None:
    name = type(optimizer).__name__
    is_off = not optimizer.capturable if isinstance(optimizer, FusedOptimizer) else False
    if is_off or any(group.get("capturable") is False for group in optimizer.param_groups):
        raise ValueError(
            f"optimizer: got {name} with capturable=False, expected {name}(…, capturable=True) for a graph"
        )
    if scaler is not None and scaler.is_enabled() and not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"optimizer: got {name}, which under a scaler waits for the device in each step; expected one of "
            "torch.optim with fused=True, or amp_dtype=torch.bfloat16 without a scaler"
        )
