"""Mixtral: top-k weights always renormalised, experts in every layer, own names (w1 gate, w3 up, w2 down)."""

from models.families.family import ATTENTION, COMMON_FIXED, COMMON_KEYS, EXPERTS, Family

MIXTRAL = Family(
    name="mixtral",
    architecture="MixtralForSequenceClassification",
    keys={
        **COMMON_KEYS,
        "expert_width": ("intermediate_size",),
    },
    defaults={"normalize_top_k": True, "rope_theta": 1000000.0, "norm_eps": 1e-5},
    fixed=COMMON_FIXED,
    parameters={
        **ATTENTION,
        **EXPERTS,
        "layers.{layer}.w_router_ED": ("model.layers.{layer}.block_sparse_moe.gate.weight",),
        "layers.{layer}.w_in_PGD": (
            "model.layers.{layer}.block_sparse_moe.experts.{expert}.w1.weight",
            "model.layers.{layer}.block_sparse_moe.experts.{expert}.w3.weight",
        ),
        "layers.{layer}.w_out_PDF": ("model.layers.{layer}.block_sparse_moe.experts.{expert}.w2.weight",),
        "layers.{layer}.const_CD": ("model.layers.{layer}.block_sparse_moe.constants",),
    },
    qk_norm="none",
    qkv_bias=False,
)
