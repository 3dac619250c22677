"""OLMoE: query/key norms over the full projection, experts in every layer. Upstream has no classification class."""

from models.families.family import ATTENTION, COMMON_FIXED, COMMON_KEYS, EXPERTS, QK_NORM, Family

OLMOE = Family(
    name="olmoe",
    architecture="OlmoeForSequenceClassification",
    keys={
        **COMMON_KEYS,
        "expert_width": ("intermediate_size",),
        "normalize_top_k": ("norm_topk_prob",),
    },
    defaults={"normalize_top_k": False, "rope_theta": 10000.0, "norm_eps": 1e-5},
    fixed=COMMON_FIXED,
    parameters={**ATTENTION, **QK_NORM, **EXPERTS},
    qk_norm="full",
    qkv_bias=False,
)
