"""Router-norm change: keep the experts whose router row grew most in fine-tuning. arXiv 2405.16646 (ICML 2024)."""

import numpy as np

from models.config import Semantics
from models.errors import PlanError
from models.pruning.method import Method, Option, each_layer
from models.pruning.plan import FloatArray, LayerPlan, keep_best
from models.pruning.stats import LayerStats, RouterPair, row_norms

# Rounding noise of a row norm, relative to the norm: float32 about 1e-7, bfloat16 about 2e-3 / sqrt(D). Movement
# below these fractions of the median norm is not told from noise.
MIN_MOVEMENT_FP32 = 1e-5
MIN_MOVEMENT_16_BIT = 1e-3
MIN_VARIATION = 1e-4


def router_norm_change(stats: LayerStats, keep: int, semantics: Semantics, allow_flat: bool = False) -> LayerPlan:
    """Keep the experts with the greatest signed change of their router row's L2 norm.

    score_E = ||w_finetuned||_2 - ||w_pretrained||_2, not the norm of the difference and not its absolute value. No
    data is needed. The paper removes the expert and leaves routing untouched (`zero`); `slice` is a deviation.
    Raises PlanError if the routers cannot carry the signal: equal, hardly moved, or all scaled alike (weight decay).
    allow_flat turns off all but the first of these guards.
    """
    routers = stats.need(RouterPair)
    score_E = norm_change(routers)
    _refuse_meaningless(stats, routers, score_E, allow_flat)
    return keep_best(score_E, keep, semantics)


def norm_change(routers: RouterPair) -> FloatArray:
    """float64 [E]: how much each row's L2 norm grew."""
    return row_norms(routers.finetuned_ED) - row_norms(routers.pretrained_ED)


def _refuse_meaningless(stats: LayerStats, routers: RouterPair, score_E: FloatArray, allow_flat: bool) -> None:
    where = f"layer {stats.layer}"
    if np.array_equal(routers.finetuned_ED, routers.pretrained_ED):
        raise PlanError(
            f"{where}: the routers are equal, so the router was frozen in fine-tuning: train it, or use frequency"
        )
    if allow_flat:
        return
    pretrained_E = row_norms(routers.pretrained_ED)
    movement = np.abs(score_E).max() / max(float(np.median(pretrained_E)), 1e-30)
    least = MIN_MOVEMENT_16_BIT if routers.stored_in_16_bit else MIN_MOVEMENT_FP32
    if movement < least:
        raise PlanError(
            f"{where}: the router did not move: its largest norm change is {movement:.1e} of the median norm, under "
            f"{least:.0e}, so its ranking would be noise. Fine-tune routers by SGD, or pass --option allow-flat=true"
        )
    ratio_E = row_norms(routers.finetuned_ED) / np.maximum(pretrained_E, 1e-30)
    if ratio_E.std() / ratio_E.mean() < MIN_VARIATION:
        raise PlanError(
            f"{where}: all router norms were scaled alike (weight decay only), so the ranking is noise. "
            "Fine-tune routers without weight decay, or pass --option allow-flat=true"
        )


ROUTER_NORM_CHANGE = Method(
    name="router-norm-change",
    summary="keep experts whose router row grew most in fine-tuning (arXiv 2405.16646); no data",
    plan=each_layer(router_norm_change),
    semantics=("zero", "slice"),
    needs=(RouterPair,),
    options=(Option("allow_flat", False, "accept routers that fine-tuning hardly moved"),),
)
