"""The parts of an encoder or decoder, of which some run whole and one in tiles: each by the model's own forward."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from ...core.families import Order, Site
from ...core.patching import PatchStack
from ..listening import silence
from .stages import Split, Stage
from .walk import Walk, can_be_walked, inner_modules, steps


class Parts:
    """What a split makes of a model: stages `before` the tiled ones, those, and stages `after` them.

    Args:
        split: which stages run in tiles.
        paths: of all modules of the model, itself first, for messages.
    """

    def __init__(self, split: Split, paths: Mapping[nn.Module, str]) -> None:
        self.split = split
        self.paths = paths
        self.model = next(iter(paths))
        self.before = range(split.tiled.start)
        self.after = range(split.tiled.stop, len(split.stages))

    def modules(self, stages: range) -> list[nn.Module]:
        return [self.split.stages[i].module for i in stages]

    @property
    def tiled(self) -> list[nn.Module]:
        return self.modules(self.split.tiled)

    def in_pieces(self) -> dict[str, nn.Module]:
        """The modules that see pieces alone, by path: tiles or strips."""
        seen = {self.paths[module]: module for stage in self.tiled for module in stage.modules()}
        for stage in filter(can_be_walked, self.modules(self.before) + self.modules(self.after)):
            seen |= inner_modules(stage, self.paths[stage])
        return seen

    @contextmanager
    def alone(self, stages: range, walk: Walk | None = None) -> Iterator[None]:
        """Inside, the model runs these stages and passes its input through the others.

        With a `walk` strip by strip where their modules are known: exact, and smaller in memory.
        """
        with PatchStack() as stack:
            for i in set(range(len(self.split.stages))) - set(stages):
                self._leave_out(self.split.stages[i], stack)
            if walk is not None:
                self._in_strips(stages, walk, stack)
            yield
            if walk is not None:
                walk.spare = None

    def _in_strips(self, stages: range, walk: Walk, stack: PatchStack) -> None:
        for stage in filter(can_be_walked, self.modules(stages)):
            for place, module in steps(stage, self.paths[stage]):
                Site(module, place, Order.IN_STRIPS, walk.technique(module, place)).install(stack)

    def _leave_out(self, stage: Stage, stack: PatchStack) -> None:
        path = self.paths[stage.module]
        stack.set(stage.module, "forward", stage.skip.forward, f"{path}.forward")
        for name, value in stage.skip.settings.items():
            stack.set(self.model, name, value, f"{self.paths[self.model]}.{name}")
        for kind in ("_forward_hooks", "_forward_pre_hooks"):  # it is called once for each part
            silence(stack, {path: stage.module}, kind)
