"""The rolling window of players and the state inside a round, on disk through Orbax."""

import errno
import os
import shutil
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from selfplay_jax import partitioning
from selfplay_jax.checkpoints import Checkpoints, abstract_like
from selfplay_jax.errors import UserError

POSITION = {"next_index": 3}


def tree(seed: int = 0):
    """Parameters of both dtypes, with the numbers that are easily lost."""
    rng = np.random.default_rng(seed)
    wide = rng.normal(size=(8, 4)).astype(np.float32)
    wide[0] = [np.nan, np.inf, -0.0, np.float32(1e-42)]
    return {
        "w": jnp.asarray(wide),
        "half": jnp.asarray(rng.normal(size=(4, 8)), jnp.bfloat16),
        "nested": {"step": jnp.int32(seed), "scale": jnp.ones((3,), jnp.float32)},
    }


def abstract(fsdp: int = 8, tensor: int = 1):
    mesh = partitioning.make_mesh(fsdp, tensor)
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = {
        "w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
        "half": NamedSharding(mesh, PartitionSpec("tensor", "fsdp")),
        "nested": {"step": whole, "scale": whole},
    }
    return abstract_like(tree(), shardings)


def placed(seed: int, like):
    return jax.tree.map(lambda leaf, to: jax.device_put(leaf, to.sharding), tree(seed), like)


def bits(leaf) -> bytes:
    return np.asarray(leaf).tobytes()


def assert_same_bits(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and bits(a) == bits(b)


@pytest.fixture
def opened(tmp_path):
    """Opens the checkpoints of one directory, as often as asked; closes them all."""
    made = []

    def open_(window: int = 3) -> Checkpoints:
        made.append(Checkpoints(tmp_path / "checkpoints", window=window))
        return made[-1]

    yield open_
    for checkpoints in made:
        checkpoints.close()


def test_kept_are_the_newest_the_first_and_the_best(opened):
    checkpoints = opened(window=2)
    kept = []
    for index, score in enumerate([0.1, 0.9, 0.2, 0.3, 0.4, 0.95, 0.5, 0.6, 0.7]):
        checkpoints.save_player(index, tree(index), score=score)
        kept.append(checkpoints.players())
    assert kept == [
        [0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [0, 1, 3, 4], [0, 4, 5], [0, 5, 6], [0, 5, 6, 7], [0, 5, 7, 8],
    ]  # fmt: skip
    assert checkpoints.best() == 5
    again = opened(window=2)
    assert again.players() == [0, 5, 7, 8] and again.best() == 5
    assert_same_bits(again.load_player(5, abstract()), tree(5))
    assert_same_bits(again.load_player(0, abstract()), tree(0))


def test_players_without_an_evaluation_are_never_the_best(opened):
    checkpoints = opened(window=1)
    assert checkpoints.players() == [] and checkpoints.best() is None
    for index, score in enumerate([None, None, -5.0, None, -7.0, None]):
        checkpoints.save_player(index, tree(index), score=score)
    assert checkpoints.players() == [0, 2, 5] and checkpoints.best() == 2


def test_without_evaluations_the_window_and_the_first_are_kept(opened):
    checkpoints = opened(window=2)
    for index in range(5):
        checkpoints.save_player(index, tree(index), score=None)
    assert checkpoints.players() == [0, 3, 4] and checkpoints.best() is None


def test_save_and_restore_are_bit_identical_on_another_mesh(opened):
    like = abstract(8, 1)
    checkpoints = opened()
    checkpoints.save_player(0, placed(3, like), score=None)
    for shape in [(8, 1), (4, 2), (2, 4)]:
        target = abstract(*shape)
        found = checkpoints.load_player(0, target)
        assert_same_bits(found, tree(3))
        for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(target), strict=True):
            assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
            assert leaf.addressable_shards[0].data.shape == wanted.sharding.shard_shape(leaf.shape)


def test_only_the_newest_state_is_kept(opened):
    checkpoints = opened()
    assert checkpoints.state_step() is None
    for key in (10_000_003, 10_000_200, 20_000_001):
        checkpoints.save_state(key, tree(key), POSITION)
        assert checkpoints.state_step() == key
    again = opened()
    assert again.state_step() == 20_000_001
    state, position = again.load_state(20_000_001, abstract(2, 4))
    assert_same_bits(state, tree(20_000_001))
    assert position == POSITION
    assert len([path for path in (again._directory / "state").iterdir() if path.is_dir()]) == 1


def test_a_missing_player_is_one_sentence(opened):
    checkpoints = opened()
    checkpoints.save_player(0, tree(), score=None)
    with pytest.raises(UserError, match=r"player 4 is not under .*players \(it holds \[0\]\); .*workdir"):
        checkpoints.load_player(4, abstract())


def test_a_half_written_step_is_never_listed(opened, tmp_path):
    checkpoints = opened()
    checkpoints.save_player(0, tree(0), score=0.5)
    checkpoints.save_state(10_000_001, tree(1), POSITION)
    players, states = tmp_path / "checkpoints" / "players", tmp_path / "checkpoints" / "state"
    for folder, step in ((players, 0), (states, 10_000_001)):
        for suffix in (ocp.utils.TMP_DIR_SUFFIX, f"{ocp.utils.TMP_DIR_SUFFIX}1700000000"):
            # a kill in the middle of a save: the files are there, the rename is not
            shutil.copytree(folder / str(step), folder / f"{step + 1}{suffix}")
            next(path for path in (folder / f"{step + 1}{suffix}").rglob("*") if path.is_file()).write_bytes(b"")
    again = opened()
    assert again.players() == [0] and again.best() == 0 and again.state_step() == 10_000_001
    again.save_player(1, tree(5), score=0.6)  # the leftover is in nobody's way
    again.save_state(10_000_002, tree(6), POSITION)
    last = opened()
    assert last.players() == [0, 1] and last.state_step() == 10_000_002
    assert_same_bits(last.load_player(1, abstract()), tree(5))
    assert_same_bits(last.load_state(10_000_002, abstract())[0], tree(6))


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (ValueError("RESOURCE_EXHAUSTED: Error writing"), "the disk is full"),
        (RuntimeError("... No space left on device ..."), "the disk is full"),
    ],
)
def test_a_save_that_fails_is_one_sentence_and_what_was_saved_stays(opened, monkeypatch, error, says):
    checkpoints = opened()
    checkpoints.save_player(0, tree(0), score=None)
    checkpoints.save_state(10_000_001, tree(1), POSITION)

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", fail)
        for save in (
            lambda: checkpoints.save_player(1, tree(1), score=0.0),
            lambda: checkpoints.save_state(9, tree(), POSITION),
        ):
            with pytest.raises(UserError, match=f"cannot save a checkpoint under .*: {says}"):
                save()
    again = opened()
    assert again.players() == [0] and again.state_step() == 10_000_001
    assert_same_bits(again.load_player(0, abstract()), tree(0))


def test_an_error_that_is_no_full_disk_is_not_called_one(opened, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("a bug")

    checkpoints = opened()
    monkeypatch.setattr(ocp.CheckpointManager, "save", fail)
    with pytest.raises(ValueError, match="a bug"):
        checkpoints.save_player(0, tree(), score=None)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "selfplay-test", str(path)]
    if os.name != "posix" or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_disk_that_is_really_full(small_disk):
    checkpoints = Checkpoints(small_disk / "checkpoints", window=2)
    checkpoints.save_player(0, tree(0), score=None)
    rng = np.random.default_rng(0)
    large = tree(1) | {"w": jnp.asarray(rng.normal(size=(400, 400)), jnp.float32)}  # noise: it does not compress
    with pytest.raises(UserError, match=r"cannot save a checkpoint under .*: (the disk is full|No space left)"):
        checkpoints.save_player(1, large, score=None)
    checkpoints.close()
    again = Checkpoints(small_disk / "checkpoints", window=2)
    assert again.players() == [0]
    assert_same_bits(again.load_player(0, abstract()), tree(0))
    again.close()
