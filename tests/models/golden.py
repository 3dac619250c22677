"""Four experts, top-2, four tokens: statistics a person can compute by hand, for the tests of all methods.

token  chosen experts and gates   outputs                     share of the residual stream (w)
t0     0: .75   1: .25            f0 = (3, 4)  f1 = (5, 12)   0
t1     0: .5    2: .5             f0 = (3, 4)  f2 = (3, 4)    1
t2     0: .6    1: .4             f0 = (6, 8)  f1 = (8, 15)   .5
t3     1: .8    2: .2             f1 = (6, 8)  f2 = (0, -10)  .2
Expert 3 is never chosen.
"""

import numpy as np

from models.pruning.stats import Core, Gram, LayerStats, Means

TOKENS = (
    # ((expert, gate, output), (expert, gate, output)), w
    (((0, 0.75, (3, 4)), (1, 0.25, (5, 12))), 0.0),
    (((0, 0.5, (3, 4)), (2, 0.5, (3, 4))), 1.0),
    (((0, 0.6, (6, 8)), (1, 0.4, (8, 15))), 0.5),
    (((1, 0.8, (6, 8)), (2, 0.2, (0, -10))), 0.2),
)


def golden(layer: int = 0, seed: int = 0) -> LayerStats:
    """The statistics, summed token by token; gates are renormalised ones, p is the gate where chosen."""
    zeros = {name: np.zeros(4) for name in ("g_E", "f_E", "f2_E", "gf_E", "gf2_E", "wgf_E", "p_E")}
    count_E, fmax_E = np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.float32)
    fsum_ED, coact_EE = np.zeros((4, 2)), np.zeros((4, 4), dtype=np.int64)
    for chosen, w in TOKENS:
        for expert, gate, output in chosen:
            norm = float(np.linalg.norm(output))
            count_E[expert] += 1
            fmax_E[expert] = max(fmax_E[expert], *(abs(value) for value in output))
            fsum_ED[expert] += output
            terms = (gate, norm, norm**2, gate * norm, (gate * norm) ** 2, w * gate * norm, gate)
            for array, term in zip(zeros.values(), terms, strict=True):
                array[expert] += term
            for other, _, _ in chosen:
                coact_EE[expert, other] += 1
    # Logits of two further tokens, for methods that compare router columns.
    logits_TE = np.array([[2.0, 0.0, 3.0, 1.0], [0.0, 1.0, 1.0, 4.0]])
    return LayerStats(
        layer=layer,
        num_experts=4,
        top_k=2,
        seed=seed,
        normalize=True,
        groups=(
            Core(tokens=np.array(4), n_E=count_E, fmax_E=fmax_E, **zeros),
            Means(fsum_ED),
            Gram(logits_TE.T @ logits_TE, logits_TE.sum(0), coact_EE),
        ),
    )
