#!/usr/bin/env python3
"""Write a GGUF from a small checkpoint in the published format, as llama.cpp's converter would, with the package `gguf`.

    python write_gguf.py '{"source": DIR, "out": FILE.gguf, "type": "Q4_K"}'

Further fields of the JSON object:

    types     {pattern: type} for single tensors (regular expressions, by their names in the file)
    split     tensors per part
    keys      {key: value} to set, null to leave out
    fuse_qkv  q, k and v of KDA layers as one tensor
    whole_kv  kv_b as it is published, not in two
    keep_a    A_log as it is published, not -exp(A_log)
    leave     names of tensors to leave out
    add       {name: [sizes, type]} tensors of zeros to add
    expected  a safetensors file: every tensor widened to f32, under its published name
    noise     relative size of the random errors of `noisy`
    noisy     a safetensors file as `expected`, with noise in the matrices that stay in blocks
    fixed_routes  biases that alone determine the choice of experts

Types that `gguf` cannot quantise get blocks of random codes with small scales. Rows that are not whole blocks get the type
that llama.cpp falls back to.
"""
import base64, json, math, pathlib, re, struct, sys

import gguf
import numpy as np
from gguf import GGMLQuantizationType as T
from safetensors.numpy import save_file

# Where the f16 scales of a block are, for blocks of random codes.
SCALES = {
    "Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,), "IQ4_XS": (0,),
    "IQ2_XXS": (0,), "IQ2_XS": (0,), "IQ2_S": (0,), "IQ3_XXS": (0,), "IQ3_S": (0,),
}
FALLBACK = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
KDA = {
    "q_proj.weight": "attn_q.weight", "k_proj.weight": "attn_k.weight", "v_proj.weight": "attn_v.weight",
    "q_conv1d.weight": "ssm_conv1d_q.weight", "k_conv1d.weight": "ssm_conv1d_k.weight",
    "v_conv1d.weight": "ssm_conv1d_v.weight", "A_log": "ssm_a", "dt_bias": "ssm_dt.bias",
    "f_a_proj.weight": "ssm_f_a.weight", "f_b_proj.weight": "ssm_f_b.weight", "g_a_proj.weight": "ssm_g_a.weight",
    "g_b_proj.weight": "ssm_g_b.weight", "b_proj.weight": "ssm_beta.weight", "o_norm.weight": "ssm_norm.weight",
    "o_proj.weight": "attn_output.weight",
}
MLA = {
    "q_proj.weight": "attn_q.weight", "kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "kv_a_layernorm.weight": "attn_kv_a_norm.weight", "o_proj.weight": "attn_output.weight",
}
FFN = {
    "mlp.gate_proj.weight": "ffn_gate.weight", "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight", "block_sparse_moe.gate.weight": "ffn_gate_inp.weight",
    "block_sparse_moe.gate.e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "block_sparse_moe.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "block_sparse_moe.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}


def published(folder):
    """The tensors of a safetensors file in f32."""
    data = (folder / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    tensors = {}
    for name, entry in json.loads(data[8:8 + length]).items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        raw = data[8 + length + start:8 + length + end]
        if entry["dtype"] == "BF16":
            values = (np.frombuffer(raw, np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(raw, np.float32)
        tensors[name] = values.reshape(entry["shape"])
    return tensors


def fixed_routes(name, biases):
    """Biases that alone determine the choice of experts (scores are below 1): otherwise different rounding in two copies would
    choose different experts for some tokens, and their logits could not be compared."""
    layer = int(name.split(".")[2])
    return (2 * ((np.arange(biases.size) + layer) % biases.size)).reshape(biases.shape).astype(np.float32)


def multiplied(name):
    """A matrix that products read in blocks: embeddings are looked up, the router is F32, and kv_b is widened when it is loaded."""
    matrix = name.endswith(("_proj.weight", "_with_mqa.weight", "lm_head.weight")) or ".experts." in name
    return matrix and not name.endswith("kv_b_proj.weight")


class Writer:
    def __init__(self, spec):
        self.spec = spec
        self.folder = pathlib.Path(spec["source"])
        self.config = json.loads((self.folder / "config.json").read_text())
        self.random = np.random.default_rng(5)
        self.expected = {}
        self.file = gguf.GGUFWriter(spec["out"], "kimi-linear", split_max_tensors=spec.get("split", 0))

    def key(self, key, value):
        """Adds one key, with the spec's value if it has one, or not at all if that is null."""
        value = self.spec.get("keys", {}).get(key, value)
        if value is None:
            return
        if key == "general.architecture":
            self.file.arch = value  # written by the package
            self.file.kv_data[0][key].value = value
        elif isinstance(value, bool):
            self.file.add_bool(key, value)
        elif isinstance(value, int):
            self.file.add_uint32(key, value)
        elif isinstance(value, float):
            self.file.add_float32(key, value)
        elif isinstance(value, str):
            self.file.add_string(key, value)
        else:
            self.file.add_array(key, value)

    def metadata(self):
        c, attention = self.config, self.config["linear_attn_config"]
        layers = c["num_hidden_layers"]
        full = [1 if i + 1 in attention["full_attn_layers"] else 0 for i in range(layers)]
        nope, rope = c["qk_nope_head_dim"], c["qk_rope_head_dim"]
        keys = {
            "block_count": layers, "context_length": c["model_max_length"], "embedding_length": c["hidden_size"],
            "feed_forward_length": c["intermediate_size"], "attention.head_count": c["num_attention_heads"],
            "attention.head_count_kv": full, "attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
            "attention.key_length": c["kv_lora_rank"] + rope, "attention.value_length": 72,
            "attention.key_length_mla": nope + rope, "attention.value_length_mla": c["v_head_dim"],
            "attention.kv_lora_rank": c["kv_lora_rank"], "rope.dimension_count": rope, "rope.freq_base": 10000.0,
            "ssm.conv_kernel": attention["short_conv_kernel_size"], "kda.head_dim": attention["head_dim"],
            "expert_count": c["num_experts"], "expert_used_count": c["num_experts_per_token"],
            "expert_feed_forward_length": c["moe_intermediate_size"], "expert_shared_count": c["num_shared_experts"],
            "leading_dense_block_count": c["first_k_dense_replace"], "expert_weights_scale": c["routed_scaling_factor"],
            "expert_gating_func": 2, "vocab_size": c["vocab_size"],
        }
        self.key("general.architecture", "kimi-linear")
        for key, value in keys.items():
            self.key(f"kimi-linear.{key}", value)
        self.key("general.file_type", 1)
        self.tokenizer()
        known = {f"kimi-linear.{key}" for key in keys} | {"general.architecture", "general.file_type"}
        for key, value in self.spec.get("keys", {}).items():
            if key not in known and not key.startswith("tokenizer.") and value is not None:
                self.key(key, value)

    def tokenizer(self):
        plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in plain]
        letter = {byte: chr(byte) for byte in plain} | {byte: chr(0x100 + i) for i, byte in enumerate(others)}
        lines = (self.folder / "tiktoken.model").read_text().splitlines()
        ranks = {int(rank): base64.b64decode(token) for token, rank in (line.split() for line in lines if line)}
        added = json.loads((self.folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
        tokens, types = [], []
        for i in range(self.config["vocab_size"]):
            if i in ranks:
                tokens.append("".join(letter[byte] for byte in ranks[i]))
                types.append(1)
            elif str(i) in added:
                tokens.append(added[str(i)]["content"])
                types.append(3)
            elif i < len(ranks) + 258:
                # The published tokenizer has so many tokens after its ordinary ones, named or not.
                tokens.append(f"<|reserved_token_{i}|>")
                types.append(3)
            else:
                tokens.append(f"[PAD{i}]")
                types.append(5)
        self.key("tokenizer.ggml.model", "gpt2")
        self.key("tokenizer.ggml.pre", "kimi-k2")
        self.key("tokenizer.ggml.tokens", tokens)
        self.key("tokenizer.ggml.token_type", types)
        self.key("tokenizer.ggml.bos_token_id", self.config["bos_token_id"])
        self.key("tokenizer.ggml.eos_token_id", self.config["bos_token_id"] + 1)
        self.key("tokenizer.ggml.padding_token_id", self.config["pad_token_id"])
        self.key("tokenizer.chat_template", (self.folder / "chat_template.jinja").read_text())

    def stored(self, name, values):
        """The bytes of a tensor in its type, and what they mean."""
        wanted = self.spec["type"]
        for pattern, other in self.spec.get("types", {}).items():
            if re.search(pattern, name):
                wanted = other
        if values.ndim < 2 or "conv1d" in name or "ffn_gate_inp" in name or name.endswith("ssm_a"):
            wanted = "F32"
        block, size = gguf.GGML_QUANT_SIZES[T[wanted]]
        if values.shape[-1] % block:
            wanted = FALLBACK.get(wanted, "IQ4_NL")
            block, size = gguf.GGML_QUANT_SIZES[T[wanted]]
        kind = T[wanted]
        if wanted == "F32":
            return kind, np.ascontiguousarray(values, np.float32), values.astype(np.float32)
        if wanted == "F16":
            halves = values.astype(np.float16)
            return kind, halves, halves.astype(np.float32)
        if wanted in SCALES:
            count = values.size // block
            data = self.random.integers(0, 256, (count, size), np.uint8)
            for at in SCALES[wanted]:
                scales = self.random.uniform(0.5e-3, 1e-3, count) * self.random.choice([-1, 1], count)
                data[:, at:at + 2] = scales.astype(np.float16).view(np.uint8).reshape(count, 2)
            data = data.reshape(*values.shape[:-1], values.shape[-1] // block * size)
        else:
            data = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), kind)
        return kind, data, gguf.quants.dequantize(data, kind).astype(np.float32)

    def tensor(self, name, values):
        """Writes a tensor; returns what it means."""
        kind, data, means = self.stored(name, values)
        if name not in self.spec.get("leave", []):
            self.file.add_tensor(name, data, raw_dtype=kind)
        return means

    def attention(self, i, tensors):
        prefix, block, c = f"model.layers.{i}.self_attn.", f"blk.{i}.", self.config
        names = [name for name in tensors if name.startswith(prefix)]
        kda = f"{prefix}A_log" in tensors
        table = KDA if kda else MLA
        fused = kda and self.spec.get("fuse_qkv")
        for name in names:
            rest, values = name[len(prefix):], tensors[name]
            if rest == "A_log":
                values = values.reshape(-1, 1)
                values = values if self.spec.get("keep_a") else -np.exp(values)
                means = self.tensor(f"{block}ssm_a", values)
                self.expected[name] = np.log(-means.astype(np.float64)).astype(np.float32).reshape(-1)
            elif rest == "kv_b_proj.weight":
                self.expected[name] = self.kv_b(block, values, c)
            elif fused and rest in ("q_proj.weight", "k_proj.weight", "v_proj.weight"):
                continue
            elif rest in table:
                shape = (1, values.shape[0], 1, values.shape[-1]) if "conv1d" in rest else values.shape
                self.expected[name] = self.tensor(block + table[rest], values.reshape(shape))
        if fused:
            parts = [f"{prefix}{part}_proj.weight" for part in "qkv"]
            means = self.tensor(f"{block}attn_qkv.weight", np.concatenate([tensors[part] for part in parts]))
            self.expected.update(zip(parts, np.split(means, 3)))

    def kv_b(self, block, values, c):
        if self.spec.get("whole_kv"):
            means = self.tensor(f"{block}attn_kv_b.weight", values)
            kinds = {self.stored(f"{block}attn_kv_b.weight", values)[0]}
        else:
            heads, nope = c["num_attention_heads"], c["qk_nope_head_dim"]
            heads_first = values.reshape(heads, nope + c["v_head_dim"], c["kv_lora_rank"])
            keys = np.ascontiguousarray(heads_first[:, :nope].transpose(0, 2, 1))
            kinds = {self.stored(f"{block}attn_k_b.weight", keys)[0]}
            keys = self.tensor(f"{block}attn_k_b.weight", keys)
            rest = np.ascontiguousarray(heads_first[:, nope:])
            kinds.add(self.stored(f"{block}attn_v_b.weight", rest)[0])
            rest = self.tensor(f"{block}attn_v_b.weight", rest)
            means = np.concatenate([keys.transpose(0, 2, 1), rest], axis=1).reshape(values.shape)
        if not kinds & {T.F32, T.BF16}:
            means = means.astype(np.float16).astype(np.float32)
        return np.ascontiguousarray(means)

    def ffn(self, i, tensors):
        prefix, block = f"model.layers.{i}.", f"blk.{i}."
        for rest, name in FFN.items():
            if prefix + rest in tensors:
                self.expected[prefix + rest] = self.tensor(block + name, tensors[prefix + rest])
        for part, name in (("w1", "ffn_gate_exps"), ("w3", "ffn_up_exps"), ("w2", "ffn_down_exps")):
            names = [f"{prefix}block_sparse_moe.experts.{e}.{part}.weight" for e in range(self.config["num_experts"])]
            if names[0] in tensors:
                means = self.tensor(f"{block}{name}.weight", np.stack([tensors[name] for name in names]))
                self.expected.update(zip(names, means))

    def tensors(self):
        tensors = published(self.folder)
        if self.spec.get("fixed_routes"):
            tensors |= {name: fixed_routes(name, values) for name, values in tensors.items() if "e_score" in name}
        for name, other in (("model.embed_tokens.weight", "token_embd.weight"), ("lm_head.weight", "output.weight"),
                            ("model.norm.weight", "output_norm.weight")):
            self.expected[name] = self.tensor(other, tensors[name])
        for i in range(self.config["num_hidden_layers"]):
            for name, other in (("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm")):
                name = f"model.layers.{i}.{name}.weight"
                self.expected[name] = self.tensor(f"blk.{i}.{other}.weight", tensors[name])
            self.attention(i, tensors)
            self.ffn(i, tensors)
        for name, (sizes, kind) in self.spec.get("add", {}).items():
            block, size = gguf.GGML_QUANT_SIZES[T[kind]]
            zeros = np.zeros((*sizes[:-1], sizes[-1] // block * size), np.uint8)
            self.file.add_tensor(name, zeros, raw_dtype=T[kind])
        missing = set(tensors) - set(self.expected)
        assert not missing, missing
        self.expected = {name: np.ascontiguousarray(values, np.float32).reshape(tensors[name].shape)
                         for name, values in self.expected.items()}

    def write(self):
        self.metadata()
        self.tensors()
        self.file.write_header_to_file()
        self.file.write_kv_data_to_file()
        self.file.write_tensors_to_file()
        self.file.close()
        if "expected" in self.spec:
            save_file(self.expected, self.spec["expected"])
        if "noise" in self.spec:
            for name in filter(multiplied, self.expected):
                factors = 1 + self.spec["noise"] * self.random.standard_normal(self.expected[name].shape)
                self.expected[name] = (self.expected[name] * factors).astype(np.float32)
            save_file(self.expected, self.spec["noisy"])


if __name__ == "__main__":
    Writer(json.loads(sys.argv[1])).write()
