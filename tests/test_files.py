"""Saved parameters: what is written is read back bit for bit, and nothing is lost, overwritten or run."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
from flax import nnx, serialization
from flax.core import freeze
from hypothesis import given, settings
from hypothesis import strategies as st

from crossvjp.adapters import files
from crossvjp.adapters.files import FORMATS, FileError, _matching, _writing
from crossvjp.adapters.files._haiku_pickle import write as write_pickle

SUFFIXES = {name: format.suffixes[0] for name, format in FORMATS.items()}
NAMED = [name for name, format in FORMATS.items() if format.by_name]

TREE: dict[str, Any] = {
    "mlp/~/linear_0": {"w": np.arange(6.0).reshape(2, 3), "b": np.array([0.1, -0.0, np.nan], ml_dtypes.bfloat16)},
    "ints": {"counter": np.array(3, np.int32), "big": np.array([2**40]), "byte": np.array([255], np.uint8)},
    "~": {"flag": np.array([True, False]), "a.b": np.array(2.5, np.float32), "half": np.ones(2, np.float16)},
    "order": np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3)),
    "complex": np.array([1 + 2j], np.complex64),
    "empty": {},
    "empties": {"inner": {}},
}


def assert_same(got: Any, expected: Any) -> None:
    """Compares structures, dtypes, shapes and bits."""
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


def saved(folder: Path, name: str, tree: Any = TREE) -> Path:
    """Writes a file of a format."""
    path = folder / f"saved{SUFFIXES[name]}"
    files.write(path, tree)
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_written_is_read_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, name)
    assert_same(files.read(path, TREE), TREE)
    assert os.listdir(tmp_path) == [path.name]
    if name in NAMED:
        assert_same(files.read(path), TREE)


@pytest.mark.parametrize("name", FORMATS)
def test_the_format_is_found_by_content_whatever_the_suffix(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path, name).rename(tmp_path / "checkpoint_100")
    assert_same(files.read(path, TREE), TREE)
    found, entries = files.entries(path)
    assert found == name
    assert len(entries) == len(jax.tree.leaves(TREE))
    if name in NAMED:
        assert files.Entry(("mlp/~/linear_0", "b"), (3,), "bfloat16") in entries


@pytest.mark.parametrize("name", ["pickle", "npz", "safetensors", "msgpack"])
def test_eight_bit_floats_are_kept(name: str, tmp_path: Path) -> None:
    tree = {"a": np.array([1.0, 2.0], ml_dtypes.float8_e4m3fn), "b": jnp.ones((), jnp.float8_e5m2)}
    assert_same(files.read(saved(tmp_path, name, tree)), tree)


@pytest.mark.parametrize(
    ("name", "tree", "message"),
    [
        ("eqx", {"a": jnp.ones(2, jnp.float8_e4m3fn)}, "it can't hold float8_e4m3fn"),
        ("orbax", {"a": np.zeros((0, 3))}, r"'a' has no elements, shape \(0, 3\), which Orbax can't hold"),
        ("safetensors", {"a": np.ones(2, np.complex128)}, "can't be written as safetensors .*complex128"),
        ("npz", {"a\0b": np.ones(2)}, "saved.npz"),
        ("npz", {1: np.ones(2), "1": np.ones(2)}, "Two keys of The whole are named '1'"),
        ("npz", {"a": np.array(["text"])}, "'a' must be an array of numbers, but has the dtype <U4"),
        ("msgpack", {"a": {"b": jax.random.key(0)}}, "'a/b' is a random key, which no file format holds"),
        ("msgpack", {"a": object()}, "'a' must be an array of numbers, but is <object"),
        ("npz", np.ones(2), "Expected a tree of arrays to write"),
        ("npz", {"__crossvjp__": np.ones(2), "e": {}}, "npz"),
    ],
    ids=range(10),
)
def test_what_a_format_cannot_hold_is_an_error_and_leaves_nothing(
    name: str, tree: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(FileError, match=message):
        saved(tmp_path, name, tree)
    assert os.listdir(tmp_path) == []


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=4) | st.sampled_from(
    ["~", "/", "a/b", "~0", "~1", "a.npy", "file", "__metadata__ ", "mlp/~/x", "é", ".", "\\"]
)
ARRAYS = st.sampled_from([np.ones(2, np.float32), np.array(3), np.ones((1, 2), ml_dtypes.bfloat16), np.zeros((0, 2))])
TREES = st.dictionaries(
    NAMES, st.recursive(ARRAYS, lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=5)
)


@pytest.mark.parametrize("name", ["npz", "safetensors"])
@given(tree=TREES)
@settings(max_examples=60, deadline=None)
def test_flat_keys_tell_all_paths_apart(name: str, tree: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("keys") / f"saved{SUFFIXES[name]}"
    files.write(path, tree)
    assert_same(files.read(path), tree)


# What frameworks and users write themselves


PARAMS = {"mlp/~/linear_0": {"w": np.ones((2, 3), np.float32), "b": np.zeros(3, np.float32)}}
STATE = {"norm": {"mean": np.full(3, 2.0, np.float32)}}
BOTH = {"params": PARAMS, "state": STATE}


@pytest.mark.parametrize(
    "pickled",
    [
        BOTH,
        (PARAMS, STATE),
        (jax.tree.map(jnp.asarray, PARAMS), jax.tree.map(jnp.asarray, STATE)),
        freeze(BOTH),
        {"params": hk.data_structures.to_immutable_dict(PARAMS), "state": STATE},
    ],
    ids=["dict", "pair", "jax", "frozen", "immutable"],
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_pickles_of_haiku_are_read(pickled: Any, protocol: int, tmp_path: Path) -> None:
    path = tmp_path / "params.pkl"
    path.write_bytes(pickle.dumps(pickled, protocol))
    assert_same(files.read(path, BOTH), BOTH)


def test_a_jax_array_of_64_bits_in_a_pickle_stays_one(tmp_path: Path) -> None:
    with jax.enable_x64(True):
        tree = {"w": jnp.ones(2, jnp.float64), "b": jnp.ones(2, jnp.bfloat16)}
        (tmp_path / "params.pkl").write_bytes(pickle.dumps(tree))
        expected = jax.tree.map(np.asarray, tree)
    assert_same(files.read(tmp_path / "params.pkl"), expected)


@pytest.mark.parametrize("separator", ["/", ".", "//"])
@pytest.mark.parametrize("name", ["npz", "safetensors"])
def test_flat_keys_of_others_are_matched_with_the_models_names(name: str, separator: str, tmp_path: Path) -> None:
    path = tmp_path / "params"
    flat = {f"mlp/~/linear_0{separator}{key}": value for key, value in PARAMS["mlp/~/linear_0"].items()}
    if name == "npz":
        np.savez(path.with_suffix(".npz"), **flat)  # pyright: ignore[reportArgumentType]
        path = path.with_suffix(".npz")
    else:
        safetensors.numpy.save_file(flat, path)
    assert_same(files.read(path, PARAMS), PARAMS)
    assert_same(files.read(path, {"params": PARAMS}), {"params": PARAMS})


def test_bfloat16_that_numpy_wrote_is_read_and_float8_is_not_guessed(tmp_path: Path) -> None:
    tree = {"a": np.array([1.5], ml_dtypes.bfloat16)}
    np.savez(tmp_path / "a.npz", a=tree["a"])
    assert_same(files.read(tmp_path / "a.npz"), tree)
    np.savez(tmp_path / "b.npz", a=np.array([1.5], ml_dtypes.float8_e5m2).view("V1"))
    with pytest.raises(FileError, match=r"does not say of which dtype 'a' is: NumPy wrote bytes alone"):
        files.read(tmp_path / "b.npz")


def test_flax_reads_and_writes_the_same_msgpack(tmp_path: Path) -> None:
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}}}
    (tmp_path / "theirs").write_bytes(serialization.to_bytes(variables))
    assert_same(files.read(tmp_path / "theirs", variables), variables)
    assert_same(serialization.from_bytes(variables, saved(tmp_path, "msgpack", variables).read_bytes()), variables)


@pytest.mark.parametrize("checkpointer", [ocp.StandardCheckpointer, ocp.PyTreeCheckpointer])
def test_checkpoints_of_orbax_and_of_nnx_are_read(checkpointer: Any, tmp_path: Path) -> None:
    model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    expected = nnx.to_pure_dict(nnx.state(model))
    writer = checkpointer()
    writer.save(tmp_path / "7" / "default", nnx.state(model))
    writer.close()
    assert_same(files.read(tmp_path / "7" / "default", expected), expected)
    assert_same(files.read(tmp_path / "7", expected), expected)


def test_orbax_restores_what_is_written(tmp_path: Path) -> None:
    variables = {"params": {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.zeros(3, jnp.bfloat16)}}}
    restored = ocp.StandardCheckpointer().restore(saved(tmp_path, "orbax", variables), variables)
    assert_same(restored, variables)


@pytest.fixture(scope="module")
def with_state() -> Any:
    """A model of Equinox with state, a Python number and bfloat16."""
    norm, state = eqx.nn.make_with_state(lambda: eqx.nn.BatchNorm(3, "batch", mode="batch"))()
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0), dtype=jnp.bfloat16)
    return (linear, norm, eqx.nn.Dropout(0.25)), state


def test_equinox_reads_and_writes_the_same_eqx(with_state: Any, tmp_path: Path) -> None:
    eqx.tree_serialise_leaves(tmp_path / "theirs.eqx", with_state)
    like = jax.tree.map(lambda leaf: leaf * 0 if eqx.is_array(leaf) else leaf, with_state)
    assert_same(files.read(tmp_path / "theirs.eqx", like), with_state)
    ours = saved(tmp_path, "eqx", with_state)
    assert ours.read_bytes() == (tmp_path / "theirs.eqx").read_bytes()
    assert_same(eqx.tree_deserialise_leaves(ours, like), with_state)


@pytest.mark.parametrize("name", NAMED)
def test_a_module_of_equinox_goes_into_formats_with_names_too(name: str, with_state: Any, tmp_path: Path) -> None:
    arrays = eqx.filter(with_state, eqx.is_array)
    path = saved(tmp_path, name, arrays)
    assert_same(files.read(path, with_state), with_state)
    assert files.Entry(("0", "0", "weight"), (3, 2), "bfloat16") in files.entries(path)[1]


def test_hyperparameters_before_a_model_are_passed_over(with_state: Any, tmp_path: Path) -> None:
    with (tmp_path / "model.eqx").open("wb") as file:
        file.write((json.dumps({"width": 3}) + "\n").encode())
        eqx.tree_serialise_leaves(file, with_state)
    assert_same(files.read(tmp_path / "model.eqx", with_state), with_state)


# Files that do not fit


@pytest.mark.parametrize(
    ("file", "like", "messages"),
    [
        ({"a": {"w": np.ones(2)}}, {"a": {"w": np.ones(3)}}, [r"model has \(3,\) at 'a/w', the file \(2,\) at 'a/w'"]),
        ({"a": np.ones(2)}, {"a": np.ones(2), "b": np.ones(4)}, [r"missing in the file: 'b', shape \(4,\)"]),
        ({"a": np.ones(2), "b": np.ones(4)}, {"a": np.ones(2)}, [r"not in the model: 'b', shape \(4,\)"]),
        (PARAMS, BOTH, ["the file has no 'state'", "missing in the file: 'state/norm/mean'"]),
        ({"a": np.ones(2)}, {"a": np.ones(2, int)}, ["model has integers at 'a', the file floats at 'a'"]),
        ({"a": 2.5}, {"a": np.ones((), int)}, ["model has integers at 'a', the file floats at 'a'"]),
        ({"a": np.ones(2)}, {"c": np.ones(2)}, ["missing in the file: 'c'", "not in the model: 'a'"]),
    ],
    ids=["shape", "missing", "left over", "collection", "kind", "kind of a number", "other names"],
)
def test_what_does_not_fit_is_listed_on_both_sides(file: Any, like: Any, messages: list[str], tmp_path: Path) -> None:
    path = saved(tmp_path, "msgpack", file)
    for message in messages:
        with pytest.raises(FileError, match=message):
            files.read(path, like)


def test_what_is_ignored_is_not_left_over(tmp_path: Path) -> None:
    path = saved(tmp_path, "msgpack", {"params": PARAMS, "step": 7, "opt_state": {"0": {"mu": np.ones(2)}}})
    with pytest.raises(FileError, match="not in the model: 'opt_state/0/mu'"):
        files.read(path, {"params": PARAMS})
    assert_same(files.read(path, {"params": PARAMS}, ignore=["opt_state/*", "step"]), {"params": PARAMS})


def test_names_that_two_arrays_would_share_are_not_respelt() -> None:
    _, missing, extra = _matching.match([("a/b", "c"), ("a", "b/c")], [("a", "b", "c")])
    assert (len(missing), len(extra)) == (2, 1)


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({"a": np.ones(2)}, r"the file holds 2 arrays, the model has 1, from 'a' to 'a'"),
        ({"a": np.ones(2), "b": np.ones(5)}, r"at 'b' the model has the shape \(5,\), the file's .* place \(3,\)"),
        ({"a": np.ones(2), "b": np.ones(3, bool)}, r"at 'b' the model has booleans, the file's .* is of float64"),
        (None, "holds arrays without names: reading it needs the model"),
    ],
)
def test_an_eqx_that_does_not_fit_is_an_error(like: Any, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path, "eqx", {"a": np.ones(2), "b": np.ones(3)})
    with pytest.raises(FileError, match=message):
        files.read(path, like)


# Damaged and foreign files


@pytest.mark.parametrize("cut", [0.3, 0.9, -1])
@pytest.mark.parametrize("name", [name for name in FORMATS if name != "orbax"])
def test_a_file_that_is_cut_off_is_an_error(name: str, cut: float, tmp_path: Path) -> None:
    path = saved(tmp_path, name)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * cut) if cut > 0 else -1])
    with pytest.raises(FileError, match=r"saved.*(cut off|damaged|does not fit)"):
        files.read(path, TREE)


def test_a_folder_that_is_no_checkpoint_or_not_one_is_an_error(tmp_path: Path) -> None:
    first, second = tmp_path / "1.orbax", tmp_path / "2.orbax"
    for path in (first, second):
        files.write(path, {"a": np.ones(2)})
    with pytest.raises(FileError, match=r"it holds several checkpoints: 1\.orbax, 2\.orbax"):
        files.read(tmp_path)
    (first / "_METADATA").unlink()
    with pytest.raises(FileError, match=r"1\.orbax' .*no checkpoint of Orbax, or not a whole one"):
        files.read(first)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected eqx, msgpack, .*found an empty file"),
        (b"<html>Not found</html>", "expected eqx, msgpack, .*begins with b'<html>Not fo'"),
        (b"version https://git-lfs.github.com/spec/v1", "expected .*begins with b'version http"),
        (pickle.dumps("text"), "it holds a str instead of parameters"),
        (pickle.dumps({"a": {"b": "text"}}), "'a/b' is 'text' of type str"),
        (pickle.dumps({"a": np.array([None])}), "'a' is array.*of type ndarray"),
        (pickle.dumps({"a": np.ones(2)}) + b"more", "more in it after the end"),
        (serialization.msgpack_serialize({"a": "text"}), "'a' is 'text' of type str"),
    ],
    ids=["empty", "html", "lfs", "str", "text", "objects", "appended", "msgpack"],
)
def test_a_foreign_file_is_an_error_that_says_what_was_found(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(FileError, match=message):
        files.read(path)


def test_other_zip_files_and_formats_are_told(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
        archive.writestr("archive/data.pkl", "torch")
    with pytest.raises(FileError, match=r"its member 'archive/data.pkl' is no array of NumPy"):
        files.read(tmp_path / "model.npz")
    with pytest.raises(FileError, match=r"is not msgpack: found npz"):
        files.read(tmp_path / "model.npz", format="msgpack")
    with pytest.raises(FileError, match=r"The suffix of .*model.bin' names no format. .* safetensors \(.safetensors\)"):
        files.write(tmp_path / "model.bin", {})
    with pytest.raises(FileNotFoundError, match="There is no file"):
        files.read(tmp_path / "absent.npz")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*absent' to write 'a.npz' into"):
        files.write(tmp_path / "absent" / "a.npz", {})


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (Malicious(os.system, "touch made"), r"(posix|nt)\.system"),
        (Malicious(eval, "open('made', 'w')"), r"\w+\.eval"),
        (Malicious(getattr, np.float32, "mro"), r"\w+\.getattr"),
        (Malicious(np.load, "made"), r"numpy\.load"),
        (hk.Linear, r"haiku\..*\.Linear"),
    ],
    ids=["system", "eval", "getattr", "load", "class"],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_anything_else_is_refused_and_not_run(
    call: Any, named: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.pkl").write_bytes(pickle.dumps({"a": {"w": np.ones(2), "x": call}}, protocol))
    with pytest.raises(FileError, match=f"the pickle calls `{named}`, but only arrays and dicts"):
        files.read("params.pkl")
    assert os.listdir(tmp_path) == ["params.pkl"]


def test_a_pickle_cannot_change_what_reads_it(tmp_path: Path) -> None:
    # BUILD sets attributes of what is on the stack, here of the function that stands for FlatMapping
    program = b"\x80\x02chaiku._src.data_structures\nFlatMapping\nN}X\x08\x00\x00\x00functionNs\x86b."
    (tmp_path / "a.pkl").write_bytes(program)
    with pytest.raises(FileError, match="the pickle sets the attribute 'function' of a function"):
        files.read(tmp_path / "a.pkl")


# Never overwritten, never half a file


@pytest.mark.parametrize("name", FORMATS)
def test_an_existing_file_stays_as_it_was(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"saved{SUFFIXES[name]}"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="exists already, and nothing is ever overwritten"):
        files.write(path, TREE)
    link = tmp_path / f"link{SUFFIXES[name]}"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileExistsError, match="exists already"):
        files.write(link, TREE)
    assert path.read_text() == "precious"
    assert sorted(os.listdir(tmp_path)) == sorted([path.name, link.name])


@pytest.mark.parametrize("links", [True, False], ids=["with links", "without links"])
@pytest.mark.parametrize("name", ["npz", "orbax"])
def test_a_file_that_appears_meanwhile_stays(
    name: str, links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"saved{SUFFIXES[name]}"
    compare = _writing._compare

    def somebody_else_writes(*args: Any) -> None:
        compare(*args)
        path.write_text("precious")

    monkeypatch.setattr(_writing, "_compare", somebody_else_writes)
    if not links:
        monkeypatch.setattr(os, "link", refused)
    with pytest.raises(FileExistsError, match="exists already"):
        files.write(path, TREE)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == [path.name]


def refused(*_: Any) -> None:
    """Fails as a file system without links does."""
    raise PermissionError("Operation not permitted")


def test_a_file_system_without_links_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refused)
    assert_same(files.read(saved(tmp_path, "npz")), TREE)
    assert os.listdir(tmp_path) == ["saved.npz"]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("odd")])
def test_a_writer_that_fails_half_way_leaves_nothing(
    failure: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(path: Path, tree: Any) -> None:
        write_pickle(path, tree)
        path.write_bytes(path.read_bytes()[:10])
        raise failure

    monkeypatch.setattr("crossvjp.adapters.files._haiku_pickle.write", half)
    expected = FileError if isinstance(failure, ValueError) else type(failure)
    with pytest.raises(expected, match=r"No space|^$|odd"):
        saved(tmp_path, "pickle")
    assert os.listdir(tmp_path) == []


def test_a_format_that_loses_something_is_caught_before_the_file_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(path: Path, tree: Any) -> None:
        write_pickle(path, jax.tree.map(lambda leaf: leaf.astype(np.float32), tree))

    monkeypatch.setattr("crossvjp.adapters.files._haiku_pickle.write", lossy)
    with pytest.raises(FileError, match=r"pickle does not keep 'a/w', float64\[2\], but gives back float32\[2\]"):
        saved(tmp_path, "pickle", {"a": {"w": np.ones(2)}})
    assert os.listdir(tmp_path) == []
