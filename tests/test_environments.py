"""No framework is needed but one's own: fresh interpreters, and real environments that hold one framework each."""

from __future__ import annotations

import fcntl
import inspect
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {"flax", "haiku", "equinox"}

# The functions from here to `nnx` run in other interpreters, which get their source: they import what they need.


def signs_only_the_parameters(make: Callable[[], tuple[Any, Any]]) -> None:
    """Runs the documented example on `make() -> (loss, params)`, eagerly and compiled."""
    import functools

    import jax
    import jax.numpy as jnp

    import crossvjp

    def f(mdl: Any, x: Any) -> Any:
        return mdl(x)

    def fwd(mdl: Any, x: Any) -> Any:
        return crossvjp.vjp(f, mdl, x)

    def bwd(vjp_fn: Any, y_t: Any) -> Any:
        input_t, params_t = vjp_fn(y_t)
        params_t = jax.tree_util.tree_map(jnp.sign, params_t)
        return input_t, params_t

    sign_grad = crossvjp.custom_vjp(f, forward_fn=fwd, backward_fn=bwd)
    loss, params = make()
    gradient = lambda use: jax.grad(functools.partial(loss, use), argnums=(0, 1))
    x = jnp.array([[3.0, -2.0]])
    own_params_bar, own_x_bar = gradient(f)(params, x)
    signs = jax.tree.map(jnp.sign, own_params_bar)
    assert not jnp.array_equal(
        max(jax.tree.leaves(own_params_bar), key=jnp.size), max(jax.tree.leaves(signs), key=jnp.size)
    )
    for run in (lambda function: function, jax.jit):
        params_bar, x_bar = run(gradient(sign_grad))(params, x)
        assert jax.tree.structure(params_bar) == jax.tree.structure(signs)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, params_bar, signs)), (params_bar, own_params_bar)
        assert jnp.allclose(x_bar, own_x_bar), (x_bar, own_x_bar)
        assert not jnp.array_equal(x_bar, jnp.sign(x_bar))
    print("OK", make.__name__)


def plain() -> tuple[Any, Any]:
    """Parameters, and the function that uses them, as one pytree."""
    import jax
    import jax.numpy as jnp

    def dense(params: Any, x: Any) -> Any:
        return x @ params["kernel"] + params["bias"][None]

    def loss(use: Any, params: Any, x: Any) -> Any:
        return use(jax.tree_util.Partial(dense, params), x).sum()

    return loss, {"kernel": jnp.array([[0.5], [-0.25]]), "bias": jnp.zeros(1)}


def linen() -> tuple[Any, Any]:
    """A Dense layer made inside a compact method."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp

    class Foo(nn.Module):
        use: Any

        @nn.compact
        def __call__(self, x: Any) -> Any:
            return self.use(nn.Dense(1), x).reshape(())

    variables = Foo(lambda mdl, x: mdl(x)).init(jax.random.key(0), jnp.ones((1, 2)))
    return lambda use, variables, x: Foo(use).apply(variables, x), variables


def nnx() -> tuple[Any, Any]:
    """A Linear layer, split outside of the loss."""
    from flax import nnx

    graphdef, params = nnx.split(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    return lambda use, params, x: use(nnx.merge(graphdef, params), x).sum(), params


def haiku() -> tuple[Any, Any]:
    """A Linear layer made inside a transform."""
    import haiku as hk
    import jax
    import jax.numpy as jnp

    def transformed(use: Any) -> hk.Transformed:
        return hk.without_apply_rng(hk.transform(lambda x: use(hk.Linear(1), x).sum()))

    params = transformed(lambda mdl, x: mdl(x)).init(jax.random.key(0), jnp.ones((1, 2)))
    return lambda use, params, x: transformed(use).apply(params, x), params


def equinox() -> tuple[Any, Any]:
    """A Linear layer."""
    import equinox as eqx
    import jax

    params, static = eqx.partition(eqx.nn.Linear(2, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    return lambda use, params, x: use(eqx.combine(params, static), x[0]).sum(), params


def script(*makers: Callable[[], tuple[Any, Any]]) -> str:
    """Writes a program that runs the example with each of the models."""
    sources = [inspect.getsource(function) for function in (signs_only_the_parameters, *makers)]
    calls = [f"signs_only_the_parameters({make.__name__})" for make in makers]
    return "\n".join(["from collections.abc import Callable", "from typing import Any", *sources, *calls, ""])


CONTRACT_OF_ALL_SUBJECTS = """
from crossvjp.testing import ADAPTER_CHECKS, built_in_subjects
(check,) = [check for check in ADAPTER_CHECKS if check.name == "the documented contract"]
for subject in built_in_subjects():
    if subject.name.endswith("mlp"):
        print(subject.name, check(subject).outcome)
"""


def run(*command: str | Path) -> str:
    """Runs a command to its end, and gives what it printed."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def interpreted(python: str | Path, program: str) -> list[str]:
    """Runs a program, isolated from the checkout and the user's site; gives the lines it printed."""
    return run(python, "-I", "-c", program).splitlines()


def test_import_loads_no_framework_and_no_adapter() -> None:
    """Importing crossvjp brings JAX, and nothing of a framework."""
    loaded = interpreted(sys.executable, "import sys, crossvjp; print(*sys.modules, sep='\\n')")
    assert "crossvjp" in loaded
    assert not {name.partition(".")[0] for name in loaded} & {*FRAMEWORKS, "optax"}
    assert [name for name in loaded if name.startswith("crossvjp.adapters")] == []


@pytest.mark.parametrize(
    ("make", "framework"),
    [(plain, "jax"), (linen, "flax"), (nnx, "flax"), (haiku, "haiku"), (equinox, "equinox")],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_call_loads_its_own_framework_only(make: Callable[[], tuple[Any, Any]], framework: str) -> None:
    """Looking for the adapter of a module imports no framework, although all are installed."""
    pytest.importorskip(framework)
    before = f"import sys, {framework}; before = set(sys.modules)\n"  # Haiku itself imports Flax where it can
    after = "print(*set(sys.modules) - before, sep='\\n')"
    first, *loaded = interpreted(sys.executable, before + script(make) + after)
    assert first == f"OK {make.__name__}"
    assert "crossvjp" in loaded
    assert {name.partition(".")[0] for name in loaded} & FRAMEWORKS <= {framework}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project as a wheel, built once a session, whichever of its workers comes first."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    dist = shared / "dist"
    with (shared / "wheel.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not dist.exists():
            # From a copy: a build writes into build/, where the links of the editable install lie.
            source = shared / "source"
            for folder in ("core", "adapters"):
                shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
            for file in ("pyproject.toml", "README.md", "LICENSE"):
                shutil.copy(ROOT / file, source)
            run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", dist, source)
    (built,) = dist.glob("crossvjp-*.whl")
    return built


@pytest.mark.environments
@pytest.mark.parametrize(
    ("extra", "framework", "makers"),
    [
        ("", "", [plain]),
        ("[flax]", "flax", [plain, linen, nnx]),
        ("[haiku]", "haiku", [plain, haiku]),
        ("[equinox]", "equinox", [plain, equinox]),
    ],
    ids=["no framework", "flax", "haiku", "equinox"],
)
def test_works_where_no_other_framework_is_installed(
    wheel: Path, tmp_path: Path, extra: str, framework: str, makers: list[Callable[[], tuple[Any, Any]]]
) -> None:
    """In a new environment with the wheel and one extra, the example runs, and no other framework is to be found."""
    venv.create(tmp_path / "env", symlinks=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--quiet", "--no-compile", f"{wheel}{extra}")
    search = f"import importlib.util as u; print(*[name for name in {sorted(FRAMEWORKS)!r} if u.find_spec(name)])"
    assert interpreted(python, search) == [framework]
    assert interpreted(python, script(*makers)) == [f"OK {make.__name__}" for make in makers]
    checked = interpreted(python, CONTRACT_OF_ALL_SUBJECTS)
    assert checked == [f"{make.__name__} mlp passed" for make in makers]
    shutil.rmtree(tmp_path / "env")  # half a gigabyte that pytest would keep for three sessions
