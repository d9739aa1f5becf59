"""The one table from logical axes to mesh axes."""

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh, PartitionSpec

from selfplay_jax import partitioning
from selfplay_jax.errors import UserError
from selfplay_jax.partitioning import DECODE_RULES, make_mesh, spec

ABSTRACT = AbstractMesh((2, 4), ("fsdp", "tensor"))
THREE = AbstractMesh((2, 2, 2), ("replica", "fsdp", "tensor"))


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("embed", "mlp"), (16, 32), ("fsdp", "tensor")),
        (("vocab", "embed"), (48, 16), ("tensor", "fsdp")),
        (("layers", "embed", "heads", "head_dim"), (2, 16, 4, 8), (None, "fsdp", "tensor", None)),
        (("layers", "embed", "kv_heads", "head_dim"), (2, 16, 8, 8), (None, "fsdp", "tensor", None)),
        (("layers", "embed", "kv_heads", "head_dim"), (2, 16, 2, 8), (None, "fsdp", None, None)),  # 4 does not divide 2
        (("embed", "mlp"), (15, 32), (None, "tensor")),
        (("embed", "mlp"), (16, 30), ("fsdp", None)),
        (("layers", "norm"), (2, 16), (None, None)),
        (("batch", None), (6, 5), ("fsdp", None)),
        (("batch", None, None), (3, 5, 5), (None, None, None)),
        (("batch", "act_heads"), (6, 4), ("fsdp", "tensor")),
        (("batch", "act_kv_heads", "act_mlp"), (6, 4, 32), ("fsdp", "tensor", None)),  # a mesh axis cuts once
        ((), (), ()),
    ],
)
def test_spec(axes, shape, expected):
    assert spec(axes, shape, ABSTRACT) == PartitionSpec(*expected)


@pytest.mark.parametrize(
    ("axes", "shape", "expected"),
    [
        (("batch", None), (8, 5), (("replica", "fsdp"), None)),
        (("batch", None), (6, 5), (None, None)),  # 4 does not divide 6
        (("embed", "mlp"), (6, 6), ("fsdp", "tensor")),  # copied over the replicas
    ],
)
def test_replicas_share_the_parameters_and_cut_the_batch(axes, shape, expected):
    assert spec(axes, shape, THREE) == PartitionSpec(*expected)


def test_rows_and_their_number():
    mesh = make_mesh(2, 2, replica=2)
    assert partitioning.data_shards(mesh) == 4
    assert partitioning.rows(mesh).shard_shape((8, 3)) == (2, 3)


def test_undivided_dimensions_are_listed():
    mesh = make_mesh(4, 2)
    axes = {"w": ("embed", "mlp"), "v": ("vocab", "embed")}
    shapes = {"w": np.zeros((6, 8)), "v": np.zeros((7, 6))}
    assert partitioning.undivided(axes, shapes, mesh) == {"embed": (6, "fsdp", 4), "vocab": (7, "tensor", 2)}


def test_spec_needs_a_name_for_every_dimension():
    with pytest.raises(ValueError, match="2 dimensions"):
        spec(("embed", "mlp"), (16,), ABSTRACT)


def test_a_mesh_without_the_axis_leaves_it_whole_or_names_it_harmlessly():
    one = make_mesh(1, 1, jax.devices()[:1])
    sharding = partitioning.sharding(("embed", "mlp"), (15, 7), one)
    assert sharding.is_fully_replicated and sharding.shard_shape((15, 7)) == (15, 7)


def test_decode_rules_keep_weights_whole_over_fsdp_and_cut_over_tensor():
    assert spec(("embed", "mlp"), (16, 32), ABSTRACT, DECODE_RULES) == PartitionSpec(None, "tensor")
    assert spec(("vocab", "embed"), (48, 16), ABSTRACT, DECODE_RULES) == PartitionSpec("tensor", None)
    assert spec(("batch", None), (6, 5), ABSTRACT, DECODE_RULES) == PartitionSpec("fsdp", None)
    assert partitioning.RULES.items() - DECODE_RULES.items() == {("embed", "fsdp")}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((-1, 1), (8, 1)), ((4, 2), (4, 2)), ((2, -1), (2, 4)), ((-1, 8), (1, 8)), ((8, -1), (8, 1)), ((1, 8), (1, 8))],
)
def test_make_mesh(sizes, expected):
    mesh = make_mesh(*sizes)
    assert mesh.axis_names == ("replica", "fsdp", "tensor") and mesh.devices.shape == (1, *expected)
    assert len({device.id for device in mesh.devices.flat}) == 8


def test_make_mesh_over_some_of_the_devices():
    assert make_mesh(-1, 2, jax.devices()[2:6]).devices.shape == (1, 2, 2)
    assert make_mesh(2, 2, replica=-1).devices.shape == (2, 2, 2)


@pytest.mark.parametrize("sizes", [(3, 2), (-1, 3), (-1, -1), (0, 8), (-1, 0), (-2, -4), (16, 1), (4, 1), (-2, -1)])
def test_sizes_that_do_not_fit_are_named(sizes):
    with pytest.raises(
        UserError, match=r"mesh\.replica=1, mesh\.fsdp=.* and mesh\.tensor=.* do not fit 8 device"
    ) as error:
        make_mesh(*sizes)
    assert f"mesh.fsdp={sizes[0]} " in str(error.value) and f"mesh.tensor={sizes[1]} " in str(error.value)


def test_tree_shardings():
    mesh = make_mesh(4, 2)
    tree = {"w": np.zeros((8, 6), np.float32), "b": np.zeros((3,), np.float32)}
    shardings = partitioning.tree_shardings({"w": ("embed", "mlp"), "b": ("norm",)}, tree, mesh)
    assert shardings["w"].spec == PartitionSpec("fsdp", "tensor") and shardings["b"].is_fully_replicated
    assert partitioning.replicated(mesh).is_fully_replicated


def test_constrain_pins_the_layout_inside_a_jitted_function():
    mesh = make_mesh(4, 2)
    with partitioning.use_mesh(mesh):
        pinned = jax.jit(lambda x: partitioning.constrain(x, "batch", "act_mlp"))(np.zeros((8, 6), np.float32))
    assert pinned.sharding.shard_shape(pinned.shape) == (2, 3)


def test_constrain_does_nothing_without_a_mesh():
    with partitioning.use_mesh(None):
        x = jax.jit(lambda x: partitioning.constrain(x, "batch", None))(np.ones((3, 2), np.float32))
    np.testing.assert_array_equal(x, np.ones((3, 2)))
