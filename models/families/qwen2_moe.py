"""Qwen2-MoE: biases on query, key and value, one shared expert behind a sigmoid gate, dense layers possible."""

from models.families.family import (
    ATTENTION,
    COMMON_FIXED,
    COMMON_KEYS,
    DENSE_LAYERS,
    EXPERTS,
    QKV_BIAS,
    SHARED_EXPERT,
    Family,
)

QWEN2_MOE = Family(
    name="qwen2_moe",
    architecture="Qwen2MoeForSequenceClassification",
    keys={
        **COMMON_KEYS,
        "expert_width": ("moe_intermediate_size",),
        "dense_width": ("intermediate_size",),
        "shared_width": ("shared_expert_intermediate_size",),
        "normalize_top_k": ("norm_topk_prob",),
        "sparse_step": ("decoder_sparse_step",),
        "dense_layers": ("mlp_only_layers",),
    },
    defaults={"normalize_top_k": False, "rope_theta": 10000.0, "norm_eps": 1e-6},
    fixed={**COMMON_FIXED, "qkv_bias": (True,)},
    parameters={**ATTENTION, **QKV_BIAS, **EXPERTS, **SHARED_EXPERT, **DENSE_LAYERS},
    qk_norm="none",
    qkv_bias=True,
)
