"""`crossvjp migrate` and `crossvjp show`: files of one framework become files of another, or nothing happens."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import saved_models
from flax import nnx, serialization

from crossvjp import _cli
from crossvjp._cli_files import _FORMATS
from crossvjp.adapters import files
from crossvjp.adapters.migrating import nnx as nnx_files

X = jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)
CALLED = {"equinox": "saved_models:batched"}


def command(params: Path, source: str, target: str, *more: str, steps: int = 0) -> int:
    """Runs the command in this process; without comparing training, which the tests of `migrate` do."""
    calls = [
        part
        for side, model in (("source", source), ("target", target))
        if model in CALLED
        for part in (f"--{side}-call", CALLED[model])
    ]
    named = ["--source", f"saved_models:{source}", "--target", f"saved_models:{target}"]
    options = [*named, "--sample", "float32[5,2]", "--steps", str(steps), *calls]
    return _cli.main(["migrate", str(params), *options, *more])


@pytest.fixture(scope="module")
def params() -> Any:
    """Parameters of the Haiku model."""
    return jax.device_get(saved_models.haiku().init(jax.random.key(0), X))


@pytest.fixture
def saved(params: Any, tmp_path: Path) -> Path:
    """Their pickle, as a Haiku user makes it."""
    path = tmp_path / "params.pkl"
    path.write_bytes(pickle.dumps(params))
    return path


def test_a_file_goes_through_all_frameworks_and_comes_back_bit_for_bit(
    params: Any, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = np.asarray(saved_models.haiku().apply(params, X))

    linen = tmp_path / "linen.msgpack"
    assert command(saved, "haiku", "Linen", "--out", str(linen), steps=2) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert f"Written: {linen}" in out
    assert any("mlp/~/linear_0" in line and "Dense_1" in line and "kernel[2,4]" in line for line in out.splitlines())
    assert any("parameters after 2 steps" in line and "holds" in line for line in out.splitlines())
    template = saved_models.Linen().init(jax.random.key(1), X)
    variables = serialization.from_bytes(template, linen.read_bytes())
    np.testing.assert_array_equal(saved_models.Linen().apply(variables, X), expected)

    orbax = tmp_path / "nnx.orbax"
    assert command(linen, "Linen", "Nnx", "--out", str(orbax)) == 0
    model = saved_models.Nnx()
    graphdef, streams, state = nnx.split(model, nnx.RngState, ...)
    nnx.replace_by_pure_dict(state, ocp.StandardCheckpointer().restore(orbax))
    np.testing.assert_array_equal(nnx.merge(graphdef, streams, state)(X), expected)

    equinox = tmp_path / "model.eqx"
    assert command(orbax, "Nnx", "equinox", "--out", str(equinox), "--no-proof") == 0
    loaded = eqx.tree_deserialise_leaves(equinox, saved_models.equinox())
    np.testing.assert_allclose(jax.vmap(loaded)(X), expected, rtol=1e-6)  # another order of the same sum

    back = tmp_path / "back.pkl"
    assert command(equinox, "equinox", "haiku", "--out", str(back), "--no-proof") == 0
    returned = pickle.loads(back.read_bytes())
    assert jax.tree.structure(returned) == jax.tree.structure(dict(params))
    jax.tree.map(np.testing.assert_array_equal, returned, dict(params))


def test_state_goes_along_in_a_haiku_pickle_and_in_collections(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    net = saved_models.stateful_haiku()
    params, state = net.init(jax.random.key(0), X, True)
    _, state = net.apply(params, state, X, True)
    pickled, linen, back = tmp_path / "pair.pkl", tmp_path / "linen.npz", tmp_path / "back.npz"
    pickled.write_bytes(pickle.dumps((params, state)))
    calls = [f"--{side}-{when}=saved_models:{how}" for side in ("source", "target") for when, how in HOW]
    assert command(pickled, "stateful_haiku", "StatefulLinen", "--out", str(linen), *calls) == 0
    expected = net.apply(params, state, X, False)[0]
    got = saved_models.StatefulLinen().apply(files.read(linen), X, False)
    np.testing.assert_allclose(np.asarray(got), expected, atol=1e-6)  # the frameworks order the same sums differently

    assert command(linen, "StatefulLinen", "stateful_haiku", "--out", str(back), *calls) == 0
    returned = files.read(back)
    assert sorted(returned) == ["params", "state"]
    jax.tree.map(np.testing.assert_array_equal, returned["params"], dict(params))

    # without its statistics
    variables = files.read(linen)
    del variables["batch_stats"]
    files.write(tmp_path / "part.npz", variables)
    capsys.readouterr()
    code = command(tmp_path / "part.npz", "StatefulLinen", "stateful_haiku", "--out", str(tmp_path / "x.npz"), *calls)
    assert code == 1
    err = capsys.readouterr().err
    assert "the file has no 'batch_stats'" in err
    assert "missing in the file: 'batch_stats/BatchNorm_0/mean', shape (3,)" in err
    assert not (tmp_path / "x.npz").exists()


def assert_files_equal(one: Path, other: Path) -> None:
    """Compares what two files hold."""
    jax.tree.map(np.testing.assert_array_equal, files.read(one), files.read(other))


HOW = (("call", "evaluating"), ("train", "training"))


def test_bfloat16_becomes_float32_in_a_model_of_that_and_never_the_other_way_round(
    params: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), dict(params))
    path, wide = tmp_path / "half.npz", tmp_path / "wide.safetensors"
    files.write(path, half)
    assert command(path, "haiku", "Nnx", "--out", str(wide), "--no-proof") == 0
    assert "Dtypes: bfloat16 before, float32 now." in capsys.readouterr().out
    kernel = files.read(wide)["a"]["kernel"]
    np.testing.assert_array_equal(kernel, np.asarray(half["mlp/~/linear_0"]["w"], np.float32))
    assert command(wide, "Nnx", "half_linen", "--out", str(tmp_path / "lost.npz")) == 1
    assert "is bfloat16, which does not hold the source's float32" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == [path.name, wide.name]


def test_a_training_state_is_read_if_the_rest_is_ignored(params: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "checkpoint_7"
    path.write_bytes(serialization.msgpack_serialize({"params": dict(params), "step": 7, "opt": {"0": np.ones(2)}}))
    assert command(path, "haiku", "Linen", "--dry-run") == 1
    assert "not in the model: 'opt/0', shape (2,)" in capsys.readouterr().err
    assert command(path, "haiku", "Linen", "--dry-run", "--no-proof", "--ignore", "step", "opt/*") == 0
    assert "Nothing is written." in capsys.readouterr().out
    assert os.listdir(tmp_path) == [path.name]


def test_random_streams_in_a_state_of_nnx_are_passed_over(tmp_path: Path) -> None:
    model = saved_models.Nnx()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "whole", nnx.state(model))
    like = nnx_files.like(model, None, ())
    with pytest.raises(files.FileError, match="not in the model: 'dropout/rngs/key/value'"):
        files.read(tmp_path / "whole", like)
    values = files.read(tmp_path / "whole", like, ignore=nnx_files.unread(model))
    np.testing.assert_array_equal(values["a"]["kernel"], model.a.kernel[...])


def test_64_bits_need_jax_to_have_them(params: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files.write(tmp_path / "wide.npz", jax.tree.map(np.float64, params))
    assert command(tmp_path / "wide.npz", "haiku", "Linen", "--dry-run") == 1
    assert "arrays of float64, which JAX would cut to float32. Set the environment variable JAX_ENABLE_X64=1" in (
        capsys.readouterr().err
    )


def test_a_model_that_computes_something_else_is_not_written(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tanh.npz"
    assert command(saved, "haiku", "Tanh", "--out", str(out)) == 1
    shown = capsys.readouterr()
    assert any("outputs" in line and "FAILS" in line for line in shown.out.splitlines())
    assert "Nothing is written." in shown.out
    assert "the two models don't compute the same." in shown.err
    assert os.listdir(tmp_path) == [saved.name]
    assert command(saved, "haiku", "Tanh", "--out", str(out), "--write-anyway") == 1
    assert sorted(os.listdir(tmp_path)) == [saved.name, out.name]
    assert f"Written: {out}" in capsys.readouterr().out
    assert command(saved, "haiku", "Tanh", "--out", str(tmp_path / "unproved.npz"), "--no-proof") == 0
    assert "The two models were not compared." in capsys.readouterr().out
    assert_files_equal(out, tmp_path / "unproved.npz")


@pytest.mark.parametrize(
    ("source", "target", "more", "code", "messages"),
    [
        ("haiku", "wide", [], 1, ["mlp/~/linear_0", "Dense_"]),
        ("haiku", "Deeper", [], 1, ["LayerNorm_0"]),
        ("wide", "haiku", [], 1, ["does not fit the model", "missing in the file", "not in the model"]),
        ("haiku", "Linen", ["--mapping", "nowhere=Dense_0"], 1, ["nowhere"]),
        ("haiku", "Linen", ["--mapping", "mlp/~/linear_0=Dense_0"], 1, ["mlp/~/linear_0", "Dense_0"]),
        ("haiku", "Linen", ["--from-format", "npz"], 1, ["is not npz: found pickle"]),
        ("haiku", "equinox", ["--target-call", "saved_models:evaluating"], 1, ["One of the models could not be run"]),
        ("haiku", "equinox", ["--target-call", "saved_models:doubled"], 1, ["outputs of shapes"]),
        ("haiku", "NOT_A_MODEL", [], 2, ["--target saved_models:NOT_A_MODEL: expected a model", "found a int"]),
        ("failing", "Linen", [], 2, ["without arguments raised RuntimeError: no weights today", "saved_models.py"]),
        ("absent", "Linen", [], 2, ["saved_models has no 'absent', but"]),
        ("haiku", "Linen", ["--source", "absent.py:net"], 2, ["there is no file 'absent.py'"]),
        ("haiku", "Linen", ["--source", "absent_module:net"], 2, ["raised ModuleNotFoundError"]),
        ("haiku", "Linen", ["--source", "haiku"], 2, ["expected `package.module:name` or `file.py:name`"]),
        ("haiku", "Linen", ["--sample", "float33[2]"], 2, ["expected an array such as float32[2,8]"]),
        ("haiku", "Linen", ["--source-call", "saved_models:NOT_A_MODEL"], 2, ["expected a function"]),
        ("haiku", "Linen", ["--to-format", "eqx"], 2, ["eqx holds models of Equinox"]),
        ("haiku", "Linen", ["--out", "model.bin"], 2, ["names no format"]),
        ("haiku", "Linen", ["--out", "absent/model.npz"], 2, ["there is no folder 'absent'"]),
        ("haiku", "Linen", ["--out", "params.pkl"], 2, ["exists already, and nothing is ever overwritten"]),
    ],
)
@pytest.mark.usefixtures("saved")
def test_what_is_wrong_is_said_and_nothing_is_written(
    source: str,
    target: str,
    more: list[str],
    code: int,
    messages: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = Path("params.pkl").read_bytes()
    given = command(Path("params.pkl"), source, target, "--out", "out.npz", *more)
    err = capsys.readouterr().err
    assert [message for message in messages if message not in err] == [], err
    assert given == code
    assert err.count("crossvjp migrate: ") == 1
    assert os.listdir(".") == ["params.pkl"]
    assert Path("params.pkl").read_bytes() == before


def test_of_two_candidates_one_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "params.pkl", tmp_path / "out.npz"
    files.write(path, saved_models.two().init(jax.random.key(0), X))
    assert command(path, "two", "Crossed", "--out", str(out)) == 1
    assert "'first' has two candidates: 'second' by the order of calls, 'first' by its name" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [path.name]
    assert command(path, "two", "Crossed", "--out", str(out), "--mapping", "first=second", "second=first") == 0
    assert out.exists()


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "There is no file"),
        (b"", 1, "found an empty file"),
        (b"<html>", 1, "another kind of file"),
        (pickle.dumps({"a": np.ones(2)})[:-9], 1, "cut off, damaged"),
        (pickle.dumps({"a": os.getcwd}), 1, "the pickle calls `posix.getcwd`"),
    ],
    ids=["missing", "empty", "foreign", "cut off", "malicious"],
)
def test_a_damaged_file_is_an_error_of_both_commands(
    content: bytes | None, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "params.pkl"
    if content is not None:
        path.write_bytes(content)
    before = os.listdir(tmp_path)
    assert command(path, "haiku", "Linen", "--out", str(tmp_path / "out.npz")) == code
    assert message in capsys.readouterr().err
    assert _cli.main(["show", str(path)]) == code
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["p", "--source", "a:b", "--target", "a:b", "--sample", "f[1]"],
            "one of the arguments --out --dry-run is req",
        ),
        (["p", "--source", "a:b", "--target", "a:b", "--dry-run"], "arguments are required: --sample"),
        (["p", "--mapping", "a"], "argument --mapping: must be SOURCE=TARGET, but is 'a'"),
        (["p", "--tolerance", "0"], "argument --tolerance: must be a number above 0, but is '0'"),
        (["p", "--tolerance", "some"], "argument --tolerance: must be a number above 0, but is 'some'"),
        (["p", "--steps", "-1"], "argument --steps: must be an integer from 0 on, but is '-1'"),
        (["p", "--from-format", "torch"], "invalid choice: 'torch'"),
    ],
)
def test_a_bad_option_is_explained(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        _cli.main(["migrate", *arguments])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", files.FORMATS)
def test_show_lists_what_a_file_holds(name: str, params: Any, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / f"params{files.FORMATS[name].suffixes[0]}"
    files.write(path, params)
    assert _cli.main(["show", str(path)]) == 0
    out = capsys.readouterr().out
    assert f"{path.name} ({name})" in out
    first = "leaf 1" if name == "eqx" else "mlp/~/linear_0/w"
    assert any(first in line and "[2, 4]" in line and "float32" in line for line in out.splitlines())
    assert "4 arrays, 27 numbers" in out


def test_the_command_line_knows_the_formats() -> None:
    assert sorted(_FORMATS) == sorted(files.FORMATS)


def run_alone(program: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    program = f"{program}; import sys; from crossvjp._cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)


def test_a_checkpoint_that_lacks_its_arrays_is_damaged(params: Any, tmp_path: Path) -> None:
    files.write(tmp_path / "params.orbax", params)
    subprocess.run(["rm", "-r", tmp_path / "params.orbax" / "d"], check=True)
    done = run_alone("pass", "show", tmp_path / "params.orbax")
    assert done.returncode == 1
    assert "crossvjp show: " in done.stderr
    assert "params.orbax' can't be read as orbax: it is cut off, damaged" in done.stderr


def test_a_missing_package_is_named_with_the_command_that_installs_it(tmp_path: Path) -> None:
    named = ["--source", "a:b", "--target", "a:b", "--sample", "f[1]", "--out", tmp_path / "a.npz"]
    done = run_alone("import sys; sys.modules['rich'] = None", "migrate", "p.pkl", *named)
    assert done.returncode == 2
    assert "crossvjp migrate: the package 'rich' is missing or too old" in done.stderr
    assert 'pip install "crossvjp[files]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("package", "format", "extra"),
    [("safetensors", "safetensors", "files"), ("flax", "msgpack", "flax"), ("orbax", "orbax", "flax")],
)
def test_so_is_the_package_of_a_format(
    package: str, format: str, extra: str, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    for name in [name for name in sys.modules if name.startswith((f"{package}.", f"{files.__name__}._{format}"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    out = saved.with_suffix(files.FORMATS[format].suffixes[0])
    assert command(saved, "haiku", "Linen", "--out", str(out)) == 2
    err = capsys.readouterr().err
    assert f"the package {package!r} is missing or too old" in err
    assert f'pip install "crossvjp[{extra}]"' in err


def test_a_file_of_python_names_models_too_in_a_real_process(params: Any, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(Path(saved_models.__file__).read_text())
    out = tmp_path / "out.npz"
    named = ["--source", f"{tmp_path}/nets.py:haiku", "--target", f"{tmp_path}/nets.py:Linen"]
    done = run_alone("pass", "migrate", saved, *named, "--sample", "float32[5,2]", "--steps", "0", "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_array_equal(files.read(out)["params"]["Dense_1"]["kernel"], params["mlp/~/linear_0"]["w"])
