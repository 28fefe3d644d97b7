"""Writes quantised copies of a small checkpoint, each with a copy of the same numbers in F32 by the format's formula.

    quantised_files.py SOURCE OUT NOISE FORMAT...

OUT/FORMAT is the quantised checkpoint, OUT/FORMAT-dense the other, and OUT/FORMAT-noisy the other with a random relative error of
size NOISE in each quantised number. The formulas follow the formats' own definitions
(compressed-tensors, OCP's e2m1, e4m3 and e8m0, MLX), each operation in f32; MLX's were compared with mlx 0.32.
"""

import json
import math
import pathlib
import sys

import numpy as np

f32 = np.float32


def read(folder):
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        if not file.name.startswith("model"):
            continue
        data = file.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8 : 8 + length]).items():
            if name == "__metadata__":
                continue
            start, end = (8 + length + at for at in entry["data_offsets"])
            raw = np.frombuffer(data[start:end], np.uint8)
            if entry["dtype"] == "BF16":
                values = (raw.view(np.uint16).astype(np.uint32) << 16).view(f32)
            else:
                assert entry["dtype"] == "F32", entry
                values = raw.view(f32)
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def write(folder, tensors, config):
    """`tensors`: name -> (dtype, array); the array's bytes are what is stored."""
    folder.mkdir(parents=True)
    header, data, at = {}, [], 0
    # Wide ones first, so that all are aligned.
    for name, (dtype, values) in sorted(tensors.items(), key=lambda item: (-item[1][1].itemsize, item[0])):
        raw = np.ascontiguousarray(values).tobytes()
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"".join(data))
    (folder / "config.json").write_text(json.dumps(config))


def bf16(values):
    """Rounded to nearest even: the stored halves and the values that they mean."""
    bits = np.asarray(values, f32).view(np.uint32)
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return bits, (bits.astype(np.uint32) << 16).view(f32)


def f16(values):
    halves = np.asarray(values, f32).astype(np.float16)
    return halves, halves.astype(f32)


def single(values):
    values = np.asarray(values, f32)
    return values, values


KINDS = {"BF16": bf16, "F16": f16, "F32": single}

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], f32)


def e4m3_table():
    values = []
    for bits in range(256):
        sign, exponent, mantissa = bits >> 7, bits >> 3 & 15, bits & 7
        if exponent == 15 and mantissa == 7:
            value = math.nan
        elif exponent == 0:
            value = mantissa / 8 * 2.0**-6
        else:
            value = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        values.append(-value if sign else value)
    return np.array(values, f32)


E4M3 = e4m3_table()


def nearest(table, values):
    """The index of the nearest finite number of a table of floats."""
    usable = np.where(np.isfinite(table), table, np.inf)
    return np.abs(values[..., None] - usable).argmin(-1).astype(np.uint8)


def bit_string(codes, bits, word):
    """Unsigned codes [rows, n] as little-endian bit strings in words."""
    planes = (codes[..., None].astype(np.uint32) >> np.arange(bits, dtype=np.uint32)) & 1
    return np.packbits(planes.reshape(len(codes), -1).astype(np.uint8), axis=1, bitorder="little").view(word)


def spread(groups, columns):
    return np.repeat(groups, columns // groups.shape[1], axis=1)


def integers(w, bits, group, symmetric, kind, packed=True, packed_zeros=True, odd=False):
    rows, columns = w.shape
    group = min(group, columns) if group else columns
    blocks = w.reshape(rows, -1, group)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if symmetric:
        scale = np.abs(blocks).max(-1) / high
    else:
        scale = (blocks.max(-1) - blocks.min(-1)) / (high - low)
    scale = np.maximum(scale, 1e-6)
    if odd:
        # A scale that f16 does not hold.
        scale[0, 0] = 3e-8
    stored_scale, scale = KINDS[kind](scale)
    zeros = None
    if not symmetric:
        zeros = np.clip(np.rint(low - blocks.min(-1) / scale), low, high).astype(np.int32)
    shift = 0 if zeros is None else spread(zeros, columns)
    q = np.clip(np.rint(w / spread(scale, columns)) + shift, low, high).astype(np.int32)
    values = (q - shift).astype(f32) * spread(scale, columns)
    out = {"weight_scale": (kind, stored_scale)}
    if packed:
        out["weight_packed"] = ("I32", bit_string(q - low, bits, np.int32))
        out["weight_shape"] = ("I64", np.array([rows, columns], np.int64))
    else:
        out["weight"] = ("I8", q.astype(np.int8))
    if zeros is not None:
        if packed_zeros:
            down = np.zeros((-rows % (32 // bits) + rows, zeros.shape[1]), np.int32)
            down[:rows] = zeros - low
            out["weight_zero_point"] = ("I32", np.ascontiguousarray(bit_string(down.T, bits, np.int32).T))
        else:
            out["weight_zero_point"] = ("I8", zeros.astype(np.int8))
    return out, values


def one_scale(w):
    scale, value = single([np.abs(w).max() / 7])
    q = np.clip(np.rint(w / value), -8, 7).astype(np.int32)
    out = {"weight_packed": ("I32", bit_string(q + 8, 4, np.int32)), "weight_scale": ("F32", scale)}
    return out, q.astype(f32) * value


def fp8(w, strategy, kind, name="weight_scale"):
    rows, columns = w.shape
    if strategy == "block":
        shape = -(-rows // 128), -(-columns // 128)
        greatest = np.array([[np.abs(w[128 * i : 128 * i + 128, 128 * j : 128 * j + 128]).max() for j in range(shape[1])] for i in range(shape[0])])
    elif strategy == "channel":
        greatest = np.abs(w).max(1, keepdims=True)
    elif strategy == "group":
        greatest = np.abs(w.reshape(rows, -1, min(64, columns))).max(-1)
    else:
        greatest = np.array([[np.abs(w).max()]])
    stored, scale = KINDS[kind](np.maximum(greatest / 448, 1e-9))
    if strategy == "block":
        full = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:rows, :columns]
    else:
        full = np.broadcast_to(scale if strategy != "group" else spread(scale, columns), w.shape)
    q = nearest(E4M3, w / full)
    if strategy == "tensor":
        stored = stored.reshape(1)
    return {"weight": ("F8_E4M3", q), name: (kind, stored)}, E4M3[q] * full


def two_in_a_byte(q):
    return (q[:, ::2] | q[:, 1::2] << 4).astype(np.uint8)


def nvfp4(w, modelopt=False):
    rows, columns = w.shape
    greatest = np.abs(w.reshape(rows, -1, 16)).max(-1)
    top = f32(np.abs(w).max() / (6 * 448))
    other = f32(1) / top
    wanted = greatest / 6 * (f32(1) / top if modelopt else other)
    scale = nearest(E4M3[:127], wanted)
    value = E4M3[scale] * top if modelopt else E4M3[scale] / other
    q = nearest(E2M1, w / np.maximum(spread(value, columns), 1e-12))
    out = {"weight_scale": ("F8_E4M3", scale)}
    if modelopt:
        out |= {"weight": ("U8", two_in_a_byte(q)), "weight_scale_2": ("F32", np.array([top], f32)), "input_scale": ("F32", np.ones(1, f32))}
    else:
        out |= {"weight_packed": ("U8", two_in_a_byte(q)), "weight_global_scale": ("F32", np.array([other], f32)), "input_global_scale": ("F32", np.ones(1, f32))}
    return out, E2M1[q] * spread(value, columns)


def power_scale(w, group, top):
    greatest = np.abs(w.reshape(len(w), -1, group)).max(-1)
    exponent = np.clip(np.ceil(np.log2(np.maximum(greatest / top, 1e-30))) + 127, 0, 254).astype(np.uint8)
    return exponent, np.ldexp(f32(1), exponent.astype(np.int32) - 127).astype(f32)


def mxfp4(w):
    exponent, value = power_scale(w, 32, 6)
    q = nearest(E2M1, w / spread(value, w.shape[1]))
    return {"weight_packed": ("U8", two_in_a_byte(q)), "weight_scale": ("U8", exponent)}, E2M1[q] * spread(value, w.shape[1])


def mlx(w, bits, kind="BF16", odd=False):
    rows, columns = w.shape
    blocks = w.reshape(rows, -1, min(64, columns))
    low = blocks.min(-1)
    scale = np.maximum((blocks.max(-1) - low) / ((1 << bits) - 1), 1e-6)
    if odd:
        # The sum of the bias and 128 scales is not exact; in f16 neither is the scale.
        scale[0, 0], low[0, 0] = 1e-9, 1.0
    stored_scale, scale = KINDS[kind](scale)
    stored_bias, bias = KINDS[kind](low)
    full, shift = spread(scale, columns), spread(bias, columns)
    q = np.clip(np.rint((w - shift) / full), 0, (1 << bits) - 1).astype(np.uint32)
    values = q.astype(f32) * full + shift
    return {"weight": ("U32", bit_string(q, bits, np.uint32)), "scales": (kind, stored_scale), "biases": (kind, stored_bias)}, values


def mlx_float(w, mode):
    columns = w.shape[1]
    if mode == "nvfp4":
        scale = nearest(E4M3[:127], np.abs(w.reshape(len(w), -1, 16)).max(-1) / 6)
        value = np.maximum(E4M3[scale], 0)
        table, bits = E2M1, 4
    else:
        table, bits, top = (E2M1, 4, 6) if mode == "mxfp4" else (E4M3, 8, 448)
        scale, value = power_scale(w, 32, top)
    full = spread(value, columns)
    q = nearest(table, w / np.maximum(full, 1e-30))
    return {"weight": ("U32", bit_string(q, bits, np.uint32)), "scales": ("U8", scale)}, table[q] * full


def group(bits, kind="int", **more):
    return {"targets": ["Linear"], "weights": {"num_bits": bits, "type": kind, **more}}


def compressed(weights, **more):
    ignore = ["lm_head", "re:.*block_sparse_moe.gate$"]
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": {"group_0": weights}, "ignore": ignore, **more}}


def mlx_config(bits, size=64, mode="affine"):
    # Layers whose rows are narrower than a group have groups of their own.
    own = {"group_size": min(size, 32), "bits": bits, "mode": mode}
    return {"quantization": {"group_size": size, "bits": bits, "mode": mode, "model.layers.1.mlp.switch_mlp.down_proj": own, "model.layers.2.mlp.gate": False}}


FORMATS = {
    "int4-g32": (lambda w, odd: integers(w, 4, 32, True, "BF16", odd=odd), compressed(group(4, symmetric=True, group_size=32))),
    "int4-g64-f16": (lambda w, odd: integers(w, 4, 64, True, "F16"), compressed(group(4, symmetric=True, strategy="group"))),
    "int4-g32-zero": (lambda w, odd: integers(w, 4, 32, False, "BF16"), compressed(group(4, symmetric=False, group_size=32))),
    "int4-g64-zero": (lambda w, odd: integers(w, 4, 64, False, "BF16"), compressed(group(4, symmetric=False))),
    "int4-channel-zero-i8": (lambda w, odd: integers(w, 4, None, False, "F32", packed_zeros=False), compressed(group(4, symmetric=False, group_size=-1))),
    "int4-tensor": (lambda w, odd: one_scale(w), compressed(group(4, symmetric=True, strategy="tensor"))),
    "int8-g32": (lambda w, odd: integers(w, 8, 32, True, "BF16", odd=odd), compressed(group(8, symmetric=True, group_size=32))),
    "int8-channel": (lambda w, odd: integers(w, 8, None, True, "F32", packed=False), compressed(group(8, symmetric=True))),
    "int8-channel-zero": (lambda w, odd: integers(w, 8, None, False, "BF16", packed=False, packed_zeros=False), compressed(group(8, symmetric=False))),
    "int8-zero-f32": (lambda w, odd: integers(w, 8, 32, False, "F32"), compressed(group(8, symmetric=False))),
    "fp8-tensor": (lambda w, odd: fp8(w, "tensor", "F32"), compressed(group(8, "float", strategy="tensor"))),
    "fp8-channel": (lambda w, odd: fp8(w, "channel", "BF16"), compressed(group(8, "float", strategy="channel"))),
    "fp8-block": (lambda w, odd: fp8(w, "block", "F32"), compressed(group(8, "float", block_structure=[128, 128]))),
    "fp8-g64": (lambda w, odd: fp8(w, "group", "F32"), compressed(group(8, "float", strategy="group"))),
    "fp8-deepseek": (
        lambda w, odd: fp8(w, "block", "F32", "weight_scale_inv"),
        {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}},
    ),
    "nvfp4": (lambda w, odd: nvfp4(w), compressed(group(4, "float", group_size=16))),
    "nvfp4-modelopt": (lambda w, odd: nvfp4(w, True), {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}),
    "mxfp4": (lambda w, odd: mxfp4(w), compressed(group(4, "float", group_size=32))),
    **{f"mlx-{bits}": (lambda w, odd, bits=bits: mlx(w, bits, odd=odd), mlx_config(bits)) for bits in (2, 3, 4, 5, 6, 8)},
    "mlx-4-f16": (lambda w, odd: mlx(w, 4, "F16"), mlx_config(4)),
    "mlx-8-f32": (lambda w, odd: mlx(w, 8, "F32"), mlx_config(8)),
    "mlx-mixed": (None, None),
    "mlx-mxfp4": (lambda w, odd: mlx_float(w, "mxfp4"), mlx_config(4, 32, "mxfp4")),
    "mlx-nvfp4": (lambda w, odd: mlx_float(w, "nvfp4"), mlx_config(4, 16, "nvfp4")),
    "mlx-mxfp8": (lambda w, odd: mlx_float(w, "mxfp8"), mlx_config(8, 32, "mxfp8")),
}



def mixed_bits(name):
    """Bits of a module of mlx-mixed: others in each layer."""
    layers = {"0": 4, "1": 6, "2": 8}
    return layers.get(name.split(".")[2], 5) if name.startswith("model.layers.") else 6


def mixed_config(stored):
    """What MLX writes of modules whose bits or groups are not the whole's."""
    modules = {}
    for name in stored:
        if name.endswith(".scales"):
            module = name.removesuffix(".scales")
            scales, codes = stored[name][1], stored[f"{module}.weight"][1]
            columns = codes.shape[-1] * 32 // mixed_bits(name)
            own = {"group_size": columns // scales.shape[-1], "bits": mixed_bits(name)}
            if own != {"group_size": 64, "bits": 4}:
                modules[module] = own
    return {"quantization": {"group_size": 64, "bits": 4, "mode": "affine", **modules}}


MLX_EXPERT = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


def sanitise(stored, config):
    """From published names to MLX's: experts stacked, `mlp` everywhere, convolutions modules in modules."""
    out, stacks = {}, {}
    for name, tensor in stored.items():
        parts = name.split(".")
        if ".experts." in name:
            expert, matrix, suffix = int(parts[5]), MLX_EXPERT[parts[6]], parts[7]
            stacks.setdefault(f"model.layers.{parts[2]}.mlp.switch_mlp.{matrix}.{suffix}", {})[expert] = tensor
            continue
        name = name.replace(".block_sparse_moe.", ".mlp.").replace("mlp.gate.e_score", "mlp.e_score")
        for x in "qkv":
            name = name.replace(f".{x}_conv1d.weight", f".{x}_conv.conv.weight")
        out[name] = tensor
    for name, experts in stacks.items():
        dtype = experts[0][0]
        out[name] = (dtype, np.stack([experts[e][1] for e in range(config["num_experts"])]))
    return out


def split_kv_b(name, w, quantise, config):
    """MLX's two parts of kv_b_proj, quantised, and the matrix that they mean."""
    heads, nope, value = config["num_attention_heads"], config["qk_nope_head_dim"], config["v_head_dim"]
    rank = w.shape[1]
    w = w.reshape(heads, nope + value, rank)
    keys, values = w[:, :nope].transpose(0, 2, 1), w[:, nope:]
    stored, dense = {}, []
    for part, matrix in (("embed_q", keys), ("unembed_out", values)):
        tensors, numbers = quantise(np.ascontiguousarray(matrix).reshape(-1, matrix.shape[2]), False)
        for suffix, (dtype, array) in tensors.items():
            stored[name.replace("kv_b_proj.weight", f"{part}.{suffix}")] = (dtype, array.reshape(heads, -1, array.shape[1]))
        dense.append(numbers.reshape(matrix.shape))
    return stored, np.concatenate([dense[0].transpose(0, 2, 1), dense[1]], 1).reshape(-1, rank)


def plain(name):
    """Whether a tensor is not quantised: the router, norms, vectors, convolutions."""
    return "conv1d" in name or name.endswith(("block_sparse_moe.gate.weight", "norm.weight")) or not name.endswith(".weight")


def fixed_routes(name, biases):
    """Biases that alone determine the choice of experts (scores are below 1), different in each layer: otherwise different
    rounding in two copies would choose different experts for some tokens, and their logits could not be compared."""
    layer = int(name.split(".")[2])
    order = (3 * np.arange(biases.size) + layer) % biases.size
    return (2 * order).reshape(biases.shape).astype(f32)


def main():
    source, out = map(pathlib.Path, sys.argv[1:3])
    noise, random = float(sys.argv[3]), np.random.default_rng(7)
    tensors, config = read(source), json.loads((source / "config.json").read_text())
    for wanted in sys.argv[4:]:
        quantise, extra = FORMATS[wanted]
        is_mlx = wanted.startswith("mlx")
        stored, dense, noisy = {}, {}, {}
        for name, w in tensors.items():
            module = name.removesuffix(".weight")
            if wanted == "mlx-mixed":
                quantise = lambda w, odd, name=name: mlx(w, mixed_bits(name))
            left = name.startswith(("lm_head", "model.embed")) and not is_mlx
            if name.endswith("e_score_correction_bias"):
                w = fixed_routes(name, w)
            if plain(name) or w.ndim != 2 or left:
                stored[name] = dense[name] = noisy[name] = ("F32", w)
                continue
            if is_mlx and "kv_b_proj" in name:
                parts, values = split_kv_b(name, w, quantise, config)
                stored |= parts
            else:
                parts, values = quantise(w, "self_attn.q_proj" in name)
                stored |= {f"{module}.{suffix}": tensor for suffix, tensor in parts.items()}
            dense[name] = ("F32", values.astype(f32))
            noisy[name] = ("F32", (values * (1 + noise * random.standard_normal(values.shape))).astype(f32))
        if is_mlx:
            stored = sanitise(stored, config)
        if wanted == "mlx-mixed":
            extra = mixed_config(stored)
        write(out / wanted, stored, config | extra)
        write(out / f"{wanted}-dense", dense, config)
        write(out / f"{wanted}-noisy", noisy, config)


main()
