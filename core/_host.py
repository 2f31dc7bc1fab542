"""`host`: a model of one framework as a submodule of another."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from ._ambient import ambient
from ._errors import ArgumentError, HandleError
from ._guest import Guest
from ._paths import Path
from ._registry import known_adapters, load_adapters


@dataclasses.dataclass(frozen=True)
class Options:
    """What a caller of `host` said beside the model and the framework."""

    sample: tuple[Any, ...]
    keywords: Mapping[str, Any]
    given: Mapping[str, Any]
    """`name`, `rngs`, `key` and `streams`, as far as they are given."""

    def taken(self, framework: str, allowed: Sequence[str], *, sample: bool) -> dict[str, Any]:
        """Gives the options that a framework's host takes.

        Raises:
            ArgumentError: there are others.
        """
        wrong = sorted(set(self.given) - set(allowed))
        if wrong:
            raise ArgumentError(
                f"The {framework} host takes {', '.join(f'`{name}`' for name in allowed)}, but got `{wrong[0]}`."
            )
        if not sample and (self.sample or self.keywords):
            raise ArgumentError(
                f"A host in {framework} initialises its guest when it is initialised itself, with the arguments of "
                "that call, so `host` takes no sample arguments here."
            )
        return {name: self.given.get(name) for name in allowed}


@runtime_checkable
class Hosting(Protocol):
    """What an adapter whose framework takes part in `host` offers beside `Adapter`.

    Attributes:
        framework: the name that callers give for it.
        makes_hosts: whether it has modules that hold submodules.
    """

    framework: str
    makes_hosts: bool

    def guest(self, model: Any, options: Options) -> Guest | None:
        """Gives a model of this framework as a guest; `None` if it is none."""
        ...

    def own(self, model: Any, options: Options) -> Any:
        """Gives a model of this framework as a submodule of another, the framework's own way; `None` if it has none."""
        ...

    def host(self, guest: Guest, options: Options) -> Any:
        """Makes a module of this framework around a guest."""
        ...


def host(
    model: Any,
    framework: str,
    *sample: Any,
    name: str | None = None,
    rngs: Any = None,
    key: Any = None,
    streams: str | Sequence[str] | None = None,
    **keywords: Any,
) -> Any:
    """Makes a module of one framework out of a model of another, to be used as a submodule like any other.

    The guest's parameters are the host's parameters and its state is the host's state, under the guest's own paths
    below the host module. It draws random numbers from the host's keys, and what it writes is published as the
    host's framework publishes. The model that is given stays as it is.

    Args:
        model: a Linen module; an NNX or Equinox module, or a class or function of `rngs` or `key` that makes one;
            an Equinox pair (module, State); `hk.Transformed` or `hk.TransformedWithState`; or a plain pair
            `(init, apply)`, with `init(key, *args) -> params` and `apply(params, *args)`. If `init` gives a dict of
            "params" and other collections, `apply` returns its output and a dict of the collections that it
            changed. A pair takes keys if `apply` has a parameter `key`.
            A model that has its values is given with them: `module.bind(variables)` in Linen,
            `crossvjp.adapters.haiku.bind(net, params, state)`, `jax.tree_util.Partial(apply, params)`. The host then
            starts with these, and not with new ones.
        framework: the host's: "linen", "nnx", "haiku" or "equinox".
        *sample: for NNX and Equinox hosts, whose variables exist from their construction on: what the guest is
            first called with, if it needs that to be initialised. Shapes and dtypes count.
        name: the submodule's name, in Linen and Haiku.
        rngs: `nnx.Rngs` for an NNX host: they make the parameters and feed the guest.
        key: a PRNG key for an Equinox host, which makes the parameters.
        streams: the streams that feed the guest, in hosts and guests whose streams have names. "dropout" if `None`;
            a Linen guest of a host with one key gets that for all of its streams.
        **keywords: more of the sample, by keyword, such as `train=True`.

    Returns:
        A module of the host's framework. It is called as the guest is, without its state and keys; an Equinox host
        whose guest has state takes and returns `eqx.nn.State` as Equinox layers do, `hosted(x, state, key=key)`.
        Other public methods of the guest are methods of it.

    Raises:
        ArgumentError: the framework has another name or is not installed, or an option belongs to another host.
        HandleError: the model is none, or lacks what this host needs.

    Example:
        >>> import flax.linen as nn, equinox as eqx, jax, jax.numpy as jnp, crossvjp
        >>> dense = crossvjp.host(nn.Dense(3), "equinox", jnp.ones(2), key=jax.random.key(0))
        >>> eqx.filter_grad(lambda dense: dense(jnp.ones(2)).sum())(dense).params["bias"]
        Array([1., 1., 1.], dtype=float32)
    """
    hosting = _hosting_of(framework)
    streams = (streams,) if isinstance(streams, str) else streams if streams is None else tuple(streams)
    if streams is not None and not (streams and all(isinstance(one, str) for one in streams)):
        raise ArgumentError(f"`streams` must be the names of one or more streams, but is {streams!r}.")
    given = {"name": name, "rngs": rngs, "key": key, "streams": streams}
    options = Options(sample, keywords, {option: value for option, value in given.items() if value is not None})
    own = hosting.own(model, options)
    return hosting.host(_guest_of(model, options), options) if own is None else own


@contextlib.contextmanager
def hosted_at(path: Path) -> Iterator[None]:
    """A context for a guest's run, in which its modules are told by their paths below its host's, at `path`.

    A guest that is itself a module is at `~` there, as the host has its path.
    """
    before = [(running, running.at) for running in ambient().running]
    for running, _ in before:
        running.at = running.relative(path)
    try:
        yield
    finally:
        for running, at in before:
            running.at = at


def _hosting_of(framework: str) -> Hosting:
    try:
        load_adapters(framework)
    except ImportError as error:
        raise ArgumentError(f"The framework {framework!r} of the host is not installed: {error}.") from error
    known = {hosting.framework: hosting for hosting in _hostings() if hosting.makes_hosts}
    if framework not in known:
        raise ArgumentError(
            f"`framework` must be the host's: 'linen', 'nnx', 'haiku' or 'equinox', but is {framework!r}."
        )
    return known[framework]


def _hostings() -> list[Hosting]:
    found = (getattr(adapter, "hosting", None) for adapter in known_adapters())
    return [hosting for hosting in found if isinstance(hosting, Hosting)]


def _guest_of(model: Any, options: Options) -> Guest:
    for hosting in _hostings():
        guest = hosting.guest(model, options)
        if guest is not None:
            return guest
    kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
    raise HandleError(
        "A guest is a Linen module, an NNX or Equinox module or a function of `rngs` or `key` that makes one, "
        f"hk.Transformed, hk.TransformedWithState, or a pair (init, apply), but this is {kind}."
    )
