"""`sites`: the calls of a model, as a table."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from ._arrays import is_array
from ._attachment import Attachment
from ._models import models_of
from ._running import Row


class Sites(tuple[Row, ...]):
    """The calls of a model in their order, one `Row` each; it prints as a table."""

    def __str__(self) -> str:
        """Gives the table."""
        lines = [("path", "class", "method", "calls", "parameters", "rule")]
        for row in self:
            parameters = " ".join(f"{name}[{','.join(map(str, shape))}]" for name, (shape, _) in row.parameters.items())
            rule = "" if row.rule is None else row.rule.described()
            lines.append((row.path or "(model)", row.kind, row.method, str(row.calls), parameters, rule))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    __repr__ = __str__


def sites(model: Any, *sample: Any, **keywords: Any) -> Sites:
    """Lists the calls that a model makes of its modules and named functions, with the rules that they run under.

    The model runs on types alone, without its rules. Linen and Haiku models are initialised for it.

    Args:
        model: a model as `attach` takes it, with or without rules.
        *sample: what the model is called with; arrays or `jax.ShapeDtypeStruct`s.
        **keywords: the same by keyword, such as `train=False`. Python values stay what they are.

    Returns:
        The calls in their order, as `Row`s: `path`, `kind`, `method`, `parameters`, `rule`, `calls`.

    Raises:
        HandleError: it is no model.

    Example:
        >>> import jax.numpy as jnp, crossvjp
        >>> reversal = crossvjp.rule(lambda call, y_bar: call.pullback(-y_bar))
        >>> net = crossvjp.attach(lambda w, x: jax.nn.relu(w * x), reversal, where=crossvjp.function("relu"))
        >>> [(row.path, row.kind, row.rule is not None) for row in sites(net, jnp.ones(3), jnp.ones(3))]
        [('', 'function', False), ('relu', 'named function', True)]
    """
    models = models_of(model)
    attachment = models.attachment_of(model) or Attachment()
    rows, program = models.record(models.detach(model), attachment, sample, keywords)
    from ._rewrite import names_in  # here, since it imports jax.extend

    names = collections.Counter(names_in(program))
    functions = [
        Row(name, "named function", "", {}, found and found[0], count)
        for name, count in names.items()
        for found in [attachment.function_rule(name)]
    ]
    together: dict[Any, Row] = {}
    for row in rows:
        key = row.path, row.kind, row.method
        known = together.get(key)
        together[key] = row if known is None else dataclasses.replace(known, calls=known.calls + 1)
    return Sites([*together.values(), *functions])


def on_types(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Traces `function(*args, **kwargs)` with types for arrays and everything else as it is; gives the program."""
    arrays, run = _split(function, args, kwargs)
    return jax.make_jaxpr(lambda arrays: [leaf for leaf in jax.tree.leaves(run(arrays)) if is_array(leaf)])(arrays)


def types_of(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Gives what `function(*args, **kwargs)` returns, with types for arrays."""
    arrays, run = _split(function, args, kwargs)
    return jax.eval_shape(run, arrays)


def _split(
    function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> tuple[list[Any], Callable[[Sequence[Any]], Any]]:
    leaves, treedef = jax.tree.flatten((tuple(args), kwargs))
    chosen = [is_array(leaf) or isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves]

    def run(arrays: Sequence[Any]) -> Any:
        rest = iter(arrays)
        filled = [next(rest) if is_one else leaf for is_one, leaf in zip(chosen, leaves, strict=True)]
        args, kwargs = jax.tree.unflatten(treedef, filled)
        return function(*args, **kwargs)

    return [leaf for leaf, is_one in zip(leaves, chosen, strict=True) if is_one], run
