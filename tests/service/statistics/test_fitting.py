"""The fitted confidence, against statsmodels."""

import numpy as np
import pytest
import statsmodels.api as sm

from service.statistics.fitting import fit_dispersion, fitting_rows


def test_the_fit_is_the_logistic_regression_of_statsmodels() -> None:
    """Both of 20,000 rows; the two made-up rows and the slight ridge are a hundredth of a standard error."""
    generator = np.random.default_rng(3)
    feature_NF = generator.random((20_000, 2))
    agrees_N = generator.random(20_000) < 1 / (1 + np.exp(-(feature_NF @ np.array([3.0, 1.0]) - 1.5)))
    fitted = fit_dispersion(feature_NF, agrees_N)
    expected = sm.Logit(agrees_N, sm.add_constant(feature_NF)).fit(disp=0).params
    assert fitted.kind == "dispersion"
    found = (fitted.bias, fitted.weights["variance"], fitted.weights["negentropy"])
    assert found == pytest.approx(tuple(expected), abs=5e-3)


def test_no_weight_is_negative() -> None:
    generator = np.random.default_rng(4)
    feature_NF = generator.random((2_000, 2))
    agrees_N = generator.random(2_000) < 1 / (1 + np.exp(-(4 * feature_NF[:, 0] - 3 * feature_NF[:, 1])))
    weights = fit_dispersion(feature_NF, agrees_N).weights
    assert weights["negentropy"] == 0
    assert weights["variance"] > 2


def test_rows_that_all_agree_have_a_finite_fit() -> None:
    fitted = fit_dispersion(np.full((50, 2), 0.9), np.ones(50, dtype=bool))
    assert all(0 <= weight < 50 for weight in fitted.weights.values())
    assert -50 < fitted.bias < 0


def test_a_quarter_of_the_rows_fits_and_groups_stay_whole() -> None:
    group_N = np.repeat(np.arange(200), 5)
    fits_N = fitting_rows(group_N)
    assert 0.25 <= fits_N.mean() <= 0.255
    assert all(len(set(fits_N[group_N == group].tolist())) == 1 for group in range(200))
    assert not np.array_equal(fits_N, fitting_rows(group_N, seed=1))
