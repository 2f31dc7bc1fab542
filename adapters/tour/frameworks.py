"""Which frameworks the tour knows; each is imported only when it is asked for."""

from __future__ import annotations

import dataclasses
import importlib

from crossvjp.tour.network import Start


@dataclasses.dataclass(frozen=True)
class Framework:
    """What the report calls a framework, and where its `Training` is."""

    label: str
    module: str
    training: str

    def load(self) -> Start:
        """Imports the framework and gives what starts a training in it."""
        return getattr(importlib.import_module(self.module), self.training)


PLAIN = Framework("plain JAX", "crossvjp.tour.plain", "PlainTraining")
OTHERS = {
    "linen": Framework("Flax Linen", "crossvjp.tour.linen", "LinenTraining"),
    "nnx": Framework("Flax NNX", "crossvjp.tour.nnx", "NnxTraining"),
    "haiku": Framework("Haiku", "crossvjp.tour.haiku", "HaikuTraining"),
    "equinox": Framework("Equinox", "crossvjp.tour.equinox", "EquinoxTraining"),
}
