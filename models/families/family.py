"""What a model family is: a table of config keys, parameter names and routing flags. No control flow in families."""

from collections.abc import Mapping
from dataclasses import dataclass

from models.config import QKNorm


@dataclass(frozen=True)
class Family:
    """A table that says how one `model_type` of Hugging Face maps onto our decoder.

    keys          our config field -> config.json keys that may hold it, first present wins.
    defaults      our config field -> value when no key is present (the class default upstream); a field without
                  default is required.
    fixed         config.json keys and the only values we run, so that an option we do not implement is refused.
    parameters    our parameter name (with {layer}) -> the checkpoint's names, stacked along rows in this order;
                  names with {expert} fill one expert each.
    architecture  the class name written to config.json.
    sizes         our config fields that must be positive integers.
    reads_images  whether inputs are images; else they are texts.
    """

    name: str
    architecture: str
    keys: Mapping[str, tuple[str, ...]]
    defaults: Mapping[str, object]
    fixed: Mapping[str, tuple[object, ...]]
    parameters: Mapping[str, tuple[str, ...]]
    qk_norm: QKNorm
    qkv_bias: bool
    sizes: tuple[str, ...] = (
        "vocab_size",
        "width",
        "num_layers",
        "num_heads",
        "num_experts",
        "top_k",
        "expert_width",
        "max_tokens",
    )
    reads_images: bool = False


COMMON_KEYS: Mapping[str, tuple[str, ...]] = {
    "vocab_size": ("vocab_size",),
    "width": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "num_heads": ("num_attention_heads",),
    "num_kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "num_experts": ("num_experts", "num_local_experts"),
    "top_k": ("num_experts_per_tok",),
    "norm_eps": ("rms_norm_eps",),
    "rope_theta": ("rope_theta",),
    "max_tokens": ("max_position_embeddings",),
}

COMMON_FIXED: Mapping[str, tuple[object, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "clip_qkv": (None,),
}

ATTENTION: Mapping[str, tuple[str, ...]] = {
    "embedding_VD": ("model.embed_tokens.weight",),
    "norm_D": ("model.norm.weight",),
    "score_CD": ("score.weight",),
    "layers.{layer}.attention_norm_D": ("model.layers.{layer}.input_layernorm.weight",),
    "layers.{layer}.ffn_norm_D": ("model.layers.{layer}.post_attention_layernorm.weight",),
    "layers.{layer}.w_qkv": (
        "model.layers.{layer}.self_attn.q_proj.weight",
        "model.layers.{layer}.self_attn.k_proj.weight",
        "model.layers.{layer}.self_attn.v_proj.weight",
    ),
    "layers.{layer}.w_o": ("model.layers.{layer}.self_attn.o_proj.weight",),
}

QKV_BIAS: Mapping[str, tuple[str, ...]] = {
    "layers.{layer}.b_qkv": (
        "model.layers.{layer}.self_attn.q_proj.bias",
        "model.layers.{layer}.self_attn.k_proj.bias",
        "model.layers.{layer}.self_attn.v_proj.bias",
    ),
}

QK_NORM: Mapping[str, tuple[str, ...]] = {
    "layers.{layer}.q_norm": ("model.layers.{layer}.self_attn.q_norm.weight",),
    "layers.{layer}.k_norm": ("model.layers.{layer}.self_attn.k_norm.weight",),
}

EXPERTS: Mapping[str, tuple[str, ...]] = {
    "layers.{layer}.w_router_ED": ("model.layers.{layer}.mlp.gate.weight",),
    "layers.{layer}.w_in_PGD": (
        "model.layers.{layer}.mlp.experts.{expert}.gate_proj.weight",
        "model.layers.{layer}.mlp.experts.{expert}.up_proj.weight",
    ),
    "layers.{layer}.w_out_PDF": ("model.layers.{layer}.mlp.experts.{expert}.down_proj.weight",),
    "layers.{layer}.const_CD": ("model.layers.{layer}.mlp.constants",),
}

DENSE_LAYERS: Mapping[str, tuple[str, ...]] = {
    "layers.{layer}.w_dense_in": (
        "model.layers.{layer}.mlp.gate_proj.weight",
        "model.layers.{layer}.mlp.up_proj.weight",
    ),
    "layers.{layer}.w_dense_out": ("model.layers.{layer}.mlp.down_proj.weight",),
}

SHARED_EXPERT: Mapping[str, tuple[str, ...]] = {
    "layers.{layer}.w_shared_in": (
        "model.layers.{layer}.mlp.shared_expert.gate_proj.weight",
        "model.layers.{layer}.mlp.shared_expert.up_proj.weight",
    ),
    "layers.{layer}.w_shared_out": ("model.layers.{layer}.mlp.shared_expert.down_proj.weight",),
    "layers.{layer}.w_shared_gate": ("model.layers.{layer}.mlp.shared_expert_gate.weight",),
}
