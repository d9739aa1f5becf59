"""What a mesh does not divide is said, and filled up."""

import ml_collections
import pytest
from tiny_models import PLAIN, mesh_of

from selfplay_jax import layout
from selfplay_jax.models import Model


def config_of(*, sft=0, epochs=2, batch_size=64, accumulate=1):
    return ml_collections.ConfigDict(
        {
            "sft": {"epochs": sft, "batch_size": 12},
            "train": {"epochs": epochs, "batch_size": batch_size, "accumulate": accumulate},
        }
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, []),
        ({"batch_size": 6}, ["train.batch_size=6 is filled up to 8 rows for 4 devices: 25%", "a multiple of 4 "]),
        ({"accumulate": 32}, ["train.batch_size=64 is filled up to 128 rows for 4 devices x 32 microbatches: 50%"]),
        ({"sft": 1, "accumulate": 2}, ["sft.batch_size=12 is filled up to 16 rows for 4 devices x 2 microbatches"]),
        ({"epochs": 0, "batch_size": 6}, []),
    ],
)
def test_batches_that_are_filled_up(changes, expected):
    notes = layout.notes(config_of(**changes), Model(PLAIN), mesh_of(4, 2))
    assert len(notes) == bool(expected)
    assert all(part in notes[0] for part in expected)


def test_parameters_that_stay_whole():
    notes = layout.notes(config_of(), Model(PLAIN), mesh_of(1, 8))
    (heads,) = (note for note in notes if "kv_heads" in note)
    assert heads.startswith(f"mesh.tensor=8 does not divide the model's kv_heads ({PLAIN.num_kv_heads})")
