"""What the observed passes of a model have in common, so that one like the last is not worked out again."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..feedback import Feedback
from ..forward.replay import Replay
from ..forward.script import Recording, Script, kept_by
from ..forward.segments import FusedLayer, SegmentedPass
from ..forward.taps import TapPolicy
from .attach import Looks, Repeated
from .deferred import Ledger

MOST_LEFT = 3
"""A network that has left so many scripts before it followed one makes other calls every time, and gets none."""


class LastPasses:
    """How the last passes ended, and what calls they made. Nothing of it holds a pass's tensors."""

    def __init__(self) -> None:
        self._alike: tuple[list[Any], Repeated] | None = None
        self._script: tuple[Script, Repeated] | None = None
        self._left = 0

    @property
    def has_script(self) -> bool:
        """Whether the next pass is compared with one."""
        return self._script is not None

    def watch(self, policy: TapPolicy, weight_layers: int) -> SegmentedPass | Replay:
        """What the next pass runs beside. The second of two that are alike is written down, for the third."""
        if not torch.compiler.is_compiling():
            written = self._script
            if written is not None:
                return Replay(written[0], policy, weight_layers)
            if self._alike is not None and self._left < MOST_LEFT:
                return Recording(policy, weight_layers)
        return SegmentedPass(policy, weight_layers)

    def replayed(
        self, replay: Replay, output: Tensor, rows: int, feedback: Feedback, backend: str, ledger: Ledger | None
    ) -> Repeated | None:
        """How the pass ends, if it was the script's; rows: how many of the output's dimensions are."""
        # Another pass, in another thread or within this one, may have written or dropped one since.
        script, ends = self._script or (None, None)
        if script is not replay.script or ends is None:
            return None
        if replay.has_followed(output) and rows == ends.plan.batch_dims and ends.suits(feedback, backend, ledger):
            self._left = 0
            return ends
        self._script, self._left = None, self._left + 1
        return None

    def like(self, now: Looks | None, feedback: Feedback, backend: str, ledger: Ledger | None) -> Repeated | None:
        """How the pass ends, if it looks like the last one that was worked out."""
        looks, ends = self._alike or (None, None)
        if now is None or ends is None:
            return None
        return ends if looks == now.looks and ends.suits(feedback, backend, ledger) else None

    def keep(self, now: Looks, ends: Repeated) -> None:
        """For passes that look so."""
        self._alike = now.looks, ends

    def forget(self) -> None:
        """The next pass is worked out."""
        self._alike = self._script = None

    def write(
        self, observer: SegmentedPass, output: Tensor, own: list[Tensor | None], last: FusedLayer | None, ends: Repeated
    ) -> None:
        """Makes the script of a pass that was like the one before and ends so, if it was recorded."""
        if not isinstance(observer, Recording):
            return
        layers = [layer for layer in (*[segment.layer for segment in observer.segments], last) if layer is not None]
        script = observer.script(output, layers)
        if script is None:
            self._left += 1
            return
        kept = kept_by(layers)
        places = [next(i for i, x in enumerate(kept) if x is own[place]) for place in ends.places]
        self._script = script, replace(ends, places=places)
