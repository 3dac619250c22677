"""The model families we run. A family is one small file and one line here."""

from collections.abc import Mapping

from models.families.family import Family
from models.families.mixtral import MIXTRAL
from models.families.olmoe import OLMOE
from models.families.qwen2_moe import QWEN2_MOE
from models.families.qwen3_moe import QWEN3_MOE
from models.families.vmoe import VMOE

FAMILIES: Mapping[str, Family] = {
    "qwen3_moe": QWEN3_MOE,
    "qwen2_moe": QWEN2_MOE,
    "olmoe": OLMOE,
    "mixtral": MIXTRAL,
    "vmoe": VMOE,
}

__all__ = ["FAMILIES", "Family"]
