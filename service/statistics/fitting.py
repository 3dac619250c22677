"""Fit a cascade's confidence: how likely is it that the control will say the same, given how dispersed the candidate's
probabilities are?

Mowst (arXiv 2311.05185) trains a small network on variance and negative entropy, together with both experts, and draws
who answers. Ours are the logistic regression instead of the network, the threshold instead of the draw, weights of at
least 0, so that a less uniform prediction is never trusted less, and the target: both models are finished, and whether
they agree needs no labels.

Legend: N rows, F features and the intercept.
"""

import numpy as np
from scipy.optimize import minimize

from service.sections import Confidence
from service.statistics.calibration import Bools, Floats, Ints
from service.statistics.confidence import DISPERSION

# Of the rows: the fit has three numbers to find, the walk over thresholds needs every row it can get.
FITTING_SHARE = 0.25
RIDGE = 0.01


def fit_dispersion(feature_NF: Floats, agrees_N: Bools) -> Confidence:
    """feature_NF: in the order of DISPERSION. Two rows are made up, one uniform that disagrees and one certain that
    agrees, so that rows which all agree have a finite fit."""
    count = feature_NF.shape[1]
    x_NF = np.concatenate([feature_NF, np.zeros((1, count)), np.ones((1, count))])
    x_NF = np.concatenate([x_NF, np.ones((len(x_NF), 1))], axis=1)
    sign_N = np.where(np.concatenate([agrees_N, [False, True]]), 1.0, -1.0)
    ridge_F = np.array([RIDGE] * count + [0.0])

    def loss(weight_F: Floats) -> tuple[float, Floats]:
        margin_N = sign_N * (x_NF @ weight_F)
        miss_N = np.exp(-np.logaddexp(0, margin_N))
        value = np.logaddexp(0, -margin_N).sum() + (ridge_F * weight_F**2).sum() / 2
        return float(value), ridge_F * weight_F - x_NF.T @ (sign_N * miss_N)

    bounds = [(0.0, None)] * count + [(None, None)]
    *weights, bias = minimize(loss, np.zeros(count + 1), jac=True, method="L-BFGS-B", bounds=bounds).x.tolist()
    named = {name: round(weight, 6) for name, weight in zip(DISPERSION, weights, strict=True)}
    return Confidence.model_validate({"kind": "dispersion", "weights": named, "bias": round(bias, 6)})


def fitting_rows(group_N: Ints, seed: int = 0) -> Bools:
    """Which rows fit: whole groups, drawn until they hold a quarter of the rows; the others are for the walk."""
    size_G = np.bincount(group_N)
    drawn_G = np.random.default_rng(seed).permutation(len(size_G))
    before_G = np.cumsum(size_G[drawn_G]) - size_G[drawn_G]
    return np.isin(group_N, drawn_G[before_G < FITTING_SHARE * len(group_N)])
