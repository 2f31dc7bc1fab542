"""What two layers' functions depend on besides their arrays, and how they differ in it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from .._paths import show
from ._layer import Layer, Layout

# What a difference in a setting changes; the settings that are not named here change the outputs.
_EFFECTS = {
    "use_fast_variance": "rounding",
    "momentum": "training",
    "dropout_rate": "training",
}


@dataclasses.dataclass(frozen=True)
class Difference:
    """A setting that two layers don't share.

    Attributes:
        name: of the setting.
        source: its value in the layer that is converted.
        target: its value in the layer that it becomes.
        effect: what it changes: "outputs"; "training", which are outputs while training and what is learnt; or
            "rounding".
        text: all of that in a sentence.
    """

    name: str
    source: Any
    target: Any
    effect: str
    text: str

    @property
    def changes_function(self) -> bool:
        """Whether the converted layer computes another function than its source when it does not train."""
        return self.effect == "outputs"


def compare_settings(source: Layer, source_layout: Layout, target: Layer, target_layout: Layout) -> list[Difference]:
    """Lists the settings in which two layers differ; what only one side states is not compared."""
    return list(_differences(source, source_layout, target, target_layout))


def settings_of(layer: Layer, layout: Layout) -> dict[str, Any]:
    """Gives a layer's settings, those that are told by its shapes among them; `None` where nothing is told."""
    settings = {
        name: value(layer) if callable(value) else value for name, value in layout.settings(layer.module).items()
    }
    return {name: value for name, value in settings.items() if value is not None}


def _differences(source: Layer, layout: Layout, target: Layer, target_layout: Layout) -> Iterator[Difference]:
    ours, theirs = settings_of(source, layout), settings_of(target, target_layout)
    for name in ours:
        if name in theirs and not _is_same(ours[name], theirs[name]):
            effect = _EFFECTS.get(name, "outputs")
            text = (
                f"{name} is {ours[name]!r} in {_titled(source)} and {theirs[name]!r} in {_titled(target)}, which "
                f"changes {'the outputs' if effect == 'outputs' else effect}."
            )
            yield Difference(name, ours[name], theirs[name], effect, text)


def _titled(layer: Layer) -> str:
    where = f"'{'/'.join(layer.path)}'" if layer.path else show(layer.path)
    return f"{layer.framework} {type(layer.module).__name__} {where}"


def _is_same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=1e-7)  # one of them may have been rounded to float32
    return bool(ours == theirs)
