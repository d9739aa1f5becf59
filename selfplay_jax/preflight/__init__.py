"""Preflight: compiles what a run would execute for a named TPU slice, on a machine without TPUs. Does it fit, how fast?

    python -m selfplay_jax.preflight --config=configs/tpaw.py:ultrachat_llama3.1_8b --topology=v5p-16

No weights are read and none are made: everything is shapes. The compiler is the real one (libtpu, the extra `tpu`).
"""
