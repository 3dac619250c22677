"""Cutting experts: methods turn statistics into plans, `apply` turns a plan into a smaller model."""

from collections.abc import Mapping

from models.pruning.method import Job, Method, Option
from models.pruning.methods.dern import DERN
from models.pruning.methods.diversify import DIVERSIFY
from models.pruning.methods.eep import EEP
from models.pruning.methods.hc_smoe import HC_SMOE
from models.pruning.methods.m_smoe import M_SMOE
from models.pruning.methods.mc_smoe import MC_SMOE
from models.pruning.methods.moe_pruner import MOE_PRUNER
from models.pruning.methods.mone import MONE
from models.pruning.methods.naee import NAEE
from models.pruning.methods.premoe_union import PREMOE_UNION
from models.pruning.methods.random import RANDOM
from models.pruning.methods.router_norm_change import ROUTER_NORM_CHANGE
from models.pruning.methods.scores import METHODS as SCORES
from models.pruning.methods.seer_moe import SEER_MOE
from models.pruning.methods.sub_moe import SUB_MOE
from models.pruning.methods.tsep import TSEP
from models.pruning.methods.uncurl import UNCURL
from models.pruning.plan import LayerPlan

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        ROUTER_NORM_CHANGE,
        *SCORES,
        SEER_MOE,
        NAEE,
        EEP,
        TSEP,
        PREMOE_UNION,
        MONE,
        DERN,
        UNCURL,
        M_SMOE,
        MC_SMOE,
        DIVERSIFY,
        HC_SMOE,
        SUB_MOE,
        MOE_PRUNER,
        RANDOM,
    )
}

__all__ = ["METHODS", "Job", "LayerPlan", "Method", "Option"]
