"""Kimi Linear in PyTorch, for training at small sizes on a CPU: KDA and MLA blocks, experts, no positions.

Parameters carry the published names, but for the routed experts, which are stacked: `block_sparse_moe.experts.w1` is
[experts, out, in]; `published` and `load_published` translate. Key width and value width are the same in every KDA head.
"""
import itertools, math, pathlib

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.cpp_extension import load

kernels = load("demo_kernels", [str(pathlib.Path(__file__).parent / "kernels.cpp")],
               extra_cflags=["-O3", "-march=native", "-ffast-math"])


def config(vocab):
    """The demo model's `config.json`, with the key names of the published one."""
    return {
        "architectures": ["KimiLinearForCausalLM"], "model_type": "kimi_linear", "dtype": "bfloat16",
        "bos_token_id": vocab - 256, "eos_token_id": vocab - 254, "pad_token_id": vocab - 1, "vocab_size": vocab,
        "hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32,
        "hidden_act": "silu", "intermediate_size": 320, "initializer_range": 0.02, "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False, "use_cache": True, "kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 32, "mla_use_nope": True, "rope_theta": 10000.0, "rope_scaling": None,
        "num_experts": 8, "num_experts_per_token": 2, "num_shared_experts": 1, "moe_intermediate_size": 64,
        "moe_layer_freq": 1, "first_k_dense_replace": 1, "moe_renormalize": True, "moe_router_activation_func": "sigmoid",
        "num_expert_group": 1, "topk_group": 1, "use_grouped_topk": True, "routed_scaling_factor": 2.446,
        "num_nextn_predict_layers": 0, "model_max_length": 8192,
        "linear_attn_config": {"full_attn_layers": [4, 8], "head_dim": 32, "kda_layers": [1, 2, 3, 5, 6, 7], "num_heads": 4,
                               "short_conv_kernel_size": 4},
    }


# How many tokens the queries, keys and values of a KDA layer's four heads are late at first, for layers in turn. Keys one late: what followed the
# same token. Queries and keys late: what followed the item before the comma. Queries and values late: what stood before that item.
LATE = [((0, 0, 0, 0), (1, 1, 0, 2), (0, 0, 0, 0)), ((0, 0, 1, 1), (1, 1, 2, 0), (0, 0, 0, 2)), ((0, 0, 2, 2), (1, 1, 3, 0), (0, 0, 0, 3))]


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def unit(x):
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


class Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        return kernels.conv_forward(x, weight)

    @staticmethod
    def backward(ctx, grad):
        return tuple(kernels.conv_backward(*ctx.saved_tensors, grad.contiguous()))


class ShortConv(nn.Module):
    """Causal depthwise convolution, then SiLU."""

    def __init__(self, dim, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, 1, width).uniform_(-0.5, 0.5))

    def forward(self, x):
        return Convolution.apply(x, self.weight.squeeze(1))


class Recurrence(torch.autograd.Function):
    """q, k, v, g [B, T, H, D] and beta [B, T, H] to o, as the definition says; see `kernels.cpp`."""

    @staticmethod
    def forward(ctx, *inputs):
        inputs = [x.contiguous() for x in inputs]
        o, kept = kernels.forward(*inputs)
        ctx.save_for_backward(*inputs, kept)
        return o

    @staticmethod
    def backward(ctx, grad):
        return tuple(kernels.backward(*ctx.saved_tensors, grad.contiguous()))


class KDA(nn.Module):
    def __init__(self, c):
        super().__init__()
        linear = c["linear_attn_config"]
        self.heads, self.dim = linear["num_heads"], linear["head_dim"]
        hidden, inner, width = c["hidden_size"], self.heads * self.dim, linear["short_conv_kernel_size"]
        for name in "qkv":
            setattr(self, f"{name}_proj", nn.Linear(hidden, inner, bias=False))
            setattr(self, f"{name}_conv1d", ShortConv(inner, width))
        # As fla initialises the decay, but slower by far: what is told must last a conversation.
        self.A_log = nn.Parameter(torch.empty(1, 1, self.heads, 1).uniform_(1, 8).log())
        dt = torch.empty(inner).uniform_(math.log(1e-5), math.log(1e-2)).exp()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))
        self.f_a_proj, self.f_b_proj = nn.Linear(hidden, self.dim, bias=False), nn.Linear(self.dim, inner, bias=False)
        self.b_proj = nn.Linear(hidden, self.heads, bias=False)
        self.g_a_proj, self.g_b_proj = nn.Linear(hidden, self.dim, bias=False), nn.Linear(self.dim, inner, bias=False)
        self.o_norm = RMSNorm(self.dim, 1e-5)
        self.o_proj = nn.Linear(inner, hidden, bias=False)

    def decay(self, x):
        """The log decay of each key channel, [B, T, H, D]: at most 0, unbounded below."""
        f = self.f_b_proj(self.f_a_proj(x)) + self.dt_bias
        return -self.A_log.exp() * F.softplus(f.unflatten(-1, (self.heads, self.dim)))

    def forward(self, x):
        split = lambda y: y.unflatten(-1, (self.heads, self.dim))  # [B, T, H, D]
        q, k, v = (split(getattr(self, f"{n}_conv1d")(getattr(self, f"{n}_proj")(x))) for n in "qkv")
        o = Recurrence.apply(unit(q) * self.dim ** -0.5, unit(k), v, self.decay(x), self.b_proj(x).sigmoid())
        o = self.o_norm(o).flatten(2) * self.g_b_proj(self.g_a_proj(x)).sigmoid()
        return self.o_proj(o)


class MLA(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.heads, self.nope, self.rope, self.v, self.latent = (
            c["num_attention_heads"], c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"], c["kv_lora_rank"])
        hidden = c["hidden_size"]
        self.q_proj = nn.Linear(hidden, self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.latent + self.rope, bias=False)
        self.kv_a_layernorm = RMSNorm(self.latent, 1e-6)
        self.kv_b_proj = nn.Linear(self.latent, self.heads * (self.nope + self.v), bias=False)
        self.o_proj = nn.Linear(self.heads * self.v, hidden, bias=False)

    def forward(self, x):
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        latent, k_pe = self.kv_a_proj_with_mqa(x).split([self.latent, self.rope], -1)
        kv = self.kv_b_proj(self.kv_a_layernorm(latent)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_nope, v = kv.split([self.nope, self.v], -1)
        k = torch.cat([k_nope, k_pe.unsqueeze(1).expand(-1, self.heads, -1, -1)], -1)
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(o.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Router(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.k, self.scale = c["num_experts_per_token"], c["routed_scaling_factor"]
        self.weight = nn.Parameter(torch.empty(c["num_experts"], c["hidden_size"]))
        self.register_buffer("e_score_correction_bias", torch.zeros(c["num_experts"]))
        self.register_buffer("load", torch.zeros(c["num_experts"]), persistent=False)

    def forward(self, x):
        scores = F.linear(x, self.weight).sigmoid()
        chosen = (scores.detach() + self.e_score_correction_bias).topk(self.k, -1).indices
        weights = scores.gather(-1, chosen)
        return chosen, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scale

    def balance(self, rate):
        """One sign step of the correction bias against the load since the last."""
        self.e_score_correction_bias += rate * (self.load.mean() - self.load).sign()
        self.load.zero_()


class Dispatch(torch.autograd.Function):
    """Rows to their places in the experts' batch, and as the gradient the other way: both are gathers."""

    @staticmethod
    def forward(ctx, x, source, back):
        ctx.save_for_backward(back)
        ctx.rows = len(x)
        return x.index_select(0, source)

    @staticmethod
    def backward(ctx, grad):
        back, = ctx.saved_tensors
        return grad.index_select(0, back).unflatten(0, (ctx.rows, -1)).sum(1), None, None


class Collect(torch.autograd.Function):
    """Results back from their places; every place is read once at most."""

    @staticmethod
    def forward(ctx, result, back):
        ctx.save_for_backward(back)
        ctx.places = len(result)
        return result.index_select(0, back)

    @staticmethod
    def backward(ctx, grad):
        back, = ctx.saved_tensors
        return grad.new_zeros(ctx.places, grad.shape[1]).index_copy_(0, back, grad), None


class Experts(nn.Module):
    def __init__(self, c):
        super().__init__()
        n, hidden, inner = c["num_experts"], c["hidden_size"], c["moe_intermediate_size"]
        self.w1, self.w3 = nn.Parameter(torch.empty(n, inner, hidden)), nn.Parameter(torch.empty(n, inner, hidden))
        self.w2 = nn.Parameter(torch.empty(n, hidden, inner))

    def forward(self, x, chosen, weights):
        """Rows sorted by expert into one padded batch [experts, rows, hidden]."""
        rows, k = chosen.shape
        n = self.w1.shape[0]
        flat = chosen.flatten()
        order = flat.argsort(stable=True)
        load = torch.bincount(flat, minlength=n)
        most = int(load.max())
        place = torch.arange(rows * k) - (load.cumsum(0) - load)[flat[order]] + flat[order] * most
        back = torch.empty_like(place).index_put((order,), place)
        source = torch.zeros(n * most, dtype=torch.long).index_put((place,), order // k)
        batch = Dispatch.apply(x, source, back).unflatten(0, (n, most))
        inner = F.silu(batch @ self.w1.transpose(1, 2)) * (batch @ self.w3.transpose(1, 2))
        result = (inner @ self.w2.transpose(1, 2)).flatten(0, 1)
        return (Collect.apply(result, back).unflatten(0, (rows, k)) * weights.unsqueeze(-1)).sum(1), load


class MoE(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.gate, self.experts = Router(c), Experts(c)
        self.shared_experts = MLP(c["hidden_size"], c["num_shared_experts"] * c["moe_intermediate_size"])

    def forward(self, x):
        rows = x.flatten(0, 1)
        routed, load = self.experts(rows, *self.gate(rows))
        if self.training:
            self.gate.load += load
        return routed.view_as(x) + self.shared_experts(x)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        hidden, eps = c["hidden_size"], c["rms_norm_eps"]
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(hidden, eps), RMSNorm(hidden, eps)
        self.self_attn = KDA(c) if layer + 1 in c["linear_attn_config"]["kda_layers"] else MLA(c)
        if layer < c["first_k_dense_replace"]:
            self.mlp = MLP(hidden, c["intermediate_size"])
        else:
            self.block_sparse_moe = MoE(c)

    def forward(self, h):
        h = h + self.self_attn(self.input_layernorm(h))
        ffn = self.mlp if hasattr(self, "mlp") else self.block_sparse_moe
        return h + ffn(self.post_attention_layernorm(h))


class KimiLinear(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.config = c
        body = nn.Module()
        body.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        body.layers = nn.ModuleList(Block(c, i) for i in range(c["num_hidden_layers"]))
        body.norm = RMSNorm(c["hidden_size"], c["rms_norm_eps"])
        self.model = body
        self.lm_head = nn.Linear(c["hidden_size"], c["vocab_size"], bias=False)

    def forward(self, ids, rows=None):
        """Logits of every position, or of those that the mask `rows` [B, T] names."""
        h = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            h = layer(h)
        return self.lm_head(self.model.norm(h if rows is None else h[rows]))

    @torch.no_grad()
    def initialise(self, seed, copying=True):
        """Weights of unit gain; with `copying`, arranged so that a KDA layer starts near copying what followed the same token
        before: queries like keys, output like the transpose of values, head like the embedding, and convolutions that look some tokens
        back (LATE). (An initialisation that imitates what training would find: Trockman et al., arXiv 2410.11135.)"""
        gen = torch.Generator().manual_seed(seed)
        depth = self.config["num_hidden_layers"]
        for name, p in self.named_parameters():
            if p.dim() < 2 or name.endswith(("A_log", "conv1d.weight")):
                continue
            scale = 0.5 if "embed_tokens" in name else p.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "w2")):
                scale /= math.sqrt(2 * depth)
            p.normal_(0, scale, generator=gen)
        if not copying:
            return
        attention = [layer.self_attn for layer in self.model.layers if isinstance(layer.self_attn, KDA)]
        for kda, lates in zip(attention, itertools.cycle(LATE)):
            kda.q_proj.weight.copy_(kda.k_proj.weight)
            kda.o_proj.weight.copy_(kda.v_proj.weight.t() / math.sqrt(depth))
            for conv, late in zip((kda.q_conv1d, kda.k_conv1d, kda.v_conv1d), lates):
                conv.weight.uniform_(-0.1, 0.1, generator=gen)
                for head, taps in enumerate(conv.weight.squeeze(1).chunk(kda.heads)):
                    taps[:, -1 - late[head % 4]] += 1
        self.lm_head.weight.copy_(self.model.embed_tokens.weight * 0.2)


def published(model):
    """name -> tensor under the published names: the routed experts one by one."""
    out = {}
    for name, t in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        if stem.endswith("block_sparse_moe.experts"):
            out |= {f"{stem}.{e}.{last}.weight": t[e] for e in range(len(t))}
        else:
            out[name] = t
    return out


def load_published(model, tensors):
    own = {}
    for name, t in model.state_dict().items():
        stem, _, last = name.rpartition(".")
        if stem.endswith("block_sparse_moe.experts"):
            own[name] = torch.stack([tensors[f"{stem}.{e}.{last}.weight"].float() for e in range(len(t))])
        else:
            own[name] = tensors[name].float().view_as(t)
    model.load_state_dict(own)
