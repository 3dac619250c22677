"""Qwen3-MoE: per-head query/key norms, no biases, dense layers possible (`mlp_only_layers`, `decoder_sparse_step`)."""

from models.families.family import ATTENTION, COMMON_FIXED, COMMON_KEYS, DENSE_LAYERS, EXPERTS, QK_NORM, Family

QWEN3_MOE = Family(
    name="qwen3_moe",
    architecture="Qwen3MoeForSequenceClassification",
    keys={
        **COMMON_KEYS,
        "expert_width": ("moe_intermediate_size",),
        "dense_width": ("intermediate_size",),
        "normalize_top_k": ("norm_topk_prob",),
        "sparse_step": ("decoder_sparse_step",),
        "dense_layers": ("mlp_only_layers",),
    },
    defaults={"normalize_top_k": False, "rope_theta": 10000.0, "norm_eps": 1e-6},
    fixed=COMMON_FIXED,
    parameters={**ATTENTION, **QK_NORM, **EXPERTS, **DENSE_LAYERS},
    qk_norm="head",
    qkv_bias=False,
)
