"""Who sees whom in a group written as one sequence, in the form that splash attention computes inside its kernel.

Apart from `splash` because importing the kernels takes a while, and only TPUs use them.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask

from selfplay_jax.models.splash import INDEX_BITS


@dataclasses.dataclass(frozen=True)
class GroupMask(splash_attention_mask.Mask):
    """The sequence [prompt | response 0 | response 1 | ...]: a response sees the prompt and itself, causally.

    prompt, response: how many columns the prompt and each response take (response 0: there are none). Time goes on from
    the prompt's last column into every response. window: how many columns back in time a query sees, itself included.
    length: of the sequence, padding included; the padding reads as further responses.
    """

    prompt: int
    response: int
    window: int | None
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        """Queries, keys."""
        return self.length, self.length

    @functools.cached_property
    def q_sequence(self) -> np.ndarray:
        """What the kernel knows of each query, int32 [length]."""
        index = np.arange(self.length, dtype=np.int32)
        branch = np.maximum(index - self.prompt, 0) // max(self.response, 1)
        return (branch << INDEX_BITS) + index

    def mask_function(self, queries: Any, keys: Any) -> Any:
        """Whether a query of `q_sequence` sees a key, given by its column; for NumPy and, in the kernel, JAX arrays."""
        index = queries & ((1 << INDEX_BITS) - 1)
        shift = (queries >> INDEX_BITS) * self.response  # columns of the responses between the prompt and this one
        in_prompt, own = keys < self.prompt, keys >= self.prompt + shift
        if self.window is not None:
            in_prompt = in_prompt & (keys > index - shift - self.window)
            own = own & (keys > index - self.window)
        return (keys <= index) & (in_prompt | own)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """The mask of a block of queries and keys, bool."""
        rows, columns = block
        keys = np.arange(columns.start, columns.stop, dtype=np.int32)
        return self.mask_function(self.q_sequence[rows, None], keys[None, :])
