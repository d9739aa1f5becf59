"""The sizes and switches of one decoder, whatever family it came from."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama-3.1's frequency scaling, or plain linear position interpolation.

    kind: "llama3" or "linear". `factor` divides the low frequencies (all of them for "linear"); the other three
    fields are those of Llama-3.1's `rope_scaling` and unused by "linear".
    """

    kind: str
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (arXiv 2106.09685): W + (alpha / rank) A B on the projections named in `targets`."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = PROJECTIONS

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Everything that shapes a Llama, Qwen2 or Mistral decoder. Hashable, so that jitted functions can close over it.

    sliding_window: a query sees its own and the `sliding_window - 1` keys before it; None sees all.
    sliding_window_from_layer: layers below this index see everything (Qwen2's `max_window_layers`).
    stop_ids: every token that ends a response (config.json and generation_config.json together).
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = None
    sliding_window_from_layer: int = 0
    max_position_embeddings: int = 4096
    bos_id: int | None = None
    stop_ids: tuple[int, ...] = ()
    pad_id: int | None = None
