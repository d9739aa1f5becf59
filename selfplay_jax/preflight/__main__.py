"""`python -m selfplay_jax.preflight`."""

import os
import sys

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported: this machine's own accelerators stay out of it

from selfplay_jax.preflight.command import main

if __name__ == "__main__":
    sys.exit(main())
