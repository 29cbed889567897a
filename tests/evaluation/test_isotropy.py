"""Tests of normality against SciPy's, against their known means, and on features that are far from Gaussian."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from lejepa_scale.evaluation import isotropy as report
from lejepa_scale.evaluation import isotropy_table
from lejepa_scale.evaluation.isotropy import (
    TESTS,
    anderson_darling,
    cramer_von_mises,
    epps_pulley,
    first_four_moments,
    jarque_bera,
    shapiro_wilk,
    watson,
)
from lejepa_scale.objective import SIGReg


@pytest.mark.parametrize("n", [12, 50, 1000])
def test_equal_to_scipy(n: int) -> None:
    x = torch.randn(n, 3, dtype=torch.float64) * 1.3 + 0.2
    x[:, 2] = x[:, 2].exp()
    for i in range(3):
        column = x[:, i].numpy()
        assert float(shapiro_wilk(x)[i]) == pytest.approx(stats.shapiro(column).statistic, abs=1e-6)
        assert float(jarque_bera(x)[i]) == pytest.approx(stats.jarque_bera(column).statistic, rel=1e-10)
        assert float(cramer_von_mises(x)[i]) == pytest.approx(stats.cramervonmises(column, "norm").statistic, rel=1e-10)


def test_equal_to_their_definitions_as_integrals() -> None:
    """Anderson-Darling and Watson: N times integrals of the squared distance of distribution functions."""
    x = torch.randn(40, 1, dtype=torch.float64) * 1.2 + 0.1
    u = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000  # F(x), uniform
    ecf = torch.searchsorted(torch.special.ndtr(x[:, 0]).sort().values, u, right=True) / len(x)
    difference = ecf - u
    assert float(anderson_darling(x)) == pytest.approx(len(x) * float((difference**2 / (u * (1 - u))).mean()), rel=1e-4)
    assert float(watson(x)) == pytest.approx(len(x) * float(difference.var(correction=0)), rel=1e-4)


def test_expectations_at_a_gaussian() -> None:
    """Means over 4000 samples of 200."""
    x = torch.randn(200, 4000, dtype=torch.float64)
    known = {epps_pulley: 1.0525, anderson_darling: 1, cramer_von_mises: 1 / 6, watson: 1 / 12, first_four_moments: 4}
    for test, expected in known.items():
        values = test(x)
        error = float(values.std()) / math.sqrt(values.numel())
        assert float(values.mean()) == pytest.approx(expected, abs=4 * error), test.__name__


def test_epps_pulley_is_sigregs_statistic() -> None:
    z = torch.randn(30, 1, dtype=torch.float64)
    torch.testing.assert_close(epps_pulley(z)[0], SIGReg(num_slices=1)(z, step=0))


def test_every_test_sees_heavy_tails() -> None:
    gaussian = torch.randn(3000, 12)
    tails = gaussian / torch.randn(3000, 1).abs().clamp_min(0.2)
    calm, loud = report(gaussian * 7 + 3), report(tails)
    assert {row.name for row in loud} == set(TESTS)
    for before, after in zip(calm, loud, strict=True):
        if after.name == "Shapiro-Wilk":
            assert after.mean < before.mean - 0.01
            assert before.mean == pytest.approx(before.gaussian_mean, abs=1e-3)
        else:
            assert after.mean > 5 * before.mean, after.name
            assert before.mean < 2 * before.gaussian_mean, before.name
    assert "Anderson-Darling" in isotropy_table(loud)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (torch.randn(5, 3), "at least 12 rows"),
        (torch.full((20, 3), math.nan), "not finite"),
        (torch.ones(20, 3), "all rows are the same"),
    ],
)
def test_rows_that_cannot_be_tested_are_refused(rows: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        report(rows)
