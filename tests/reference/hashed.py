"""Weights that need no file: each number is a hash of its tensor's name and its index, exact in the dtype in which it is stored.

`tests/common/hashed.rs` generates the same ones. Uniform, about as large as those of `make_reference.py`, gates with a few
extreme channels, and small if an epsilon should have an effect.
"""
import numpy as np


def values(name, count):
    """The numbers of a published tensor, in order: [count], f32."""
    seed = np.uint32(0x811C9DC5)
    with np.errstate(over="ignore"):
        for byte in name.encode():  # FNV-1a
            seed = (seed ^ np.uint32(byte)) * np.uint32(0x01000193)
        i = np.arange(count, dtype=np.uint32)
        x = seed + i * np.uint32(0x9E3779B9)
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
        x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
        x ^= x >> np.uint32(16)
    q = (x >> np.uint32(24)).astype(np.uint8).view(np.int8).astype(np.float32)
    about_zero = lambda exponent: (q + np.float32(0.5)) / np.float32(128) * np.float32(2.0**exponent)
    if name.endswith("A_log"):
        return (q + np.float32(128)) * np.float32(11) / np.float32(1024)
    if name.endswith("dt_bias"):
        out = np.float32(-7) + (q + np.float32(128)) * np.float32(19) / np.float32(1024)
        out[::17] = 3.0  # forgets within a token
        out[5::23] = -12.0  # never forgets
        return out
    if "norm" in name:
        return np.float32(1) + np.floor(q / np.float32(4)) / np.float32(64)
    if "embed_tokens" in name:
        return about_zero(1)
    if "conv1d" in name:
        return about_zero(0)
    if name.endswith("kv_a_proj_with_mqa.weight"):
        return about_zero(-11)  # a small latent: kv_a_layernorm's epsilon counts
    if name.endswith("k_proj.weight") or "layers.1.self_attn.q_proj" in name:
        return about_zero(-10)  # small queries and keys: the L2 norm's epsilon counts
    return about_zero(-3)
