from __future__ import annotations

import pytest
import torch

from lejepa_scale.objective import LeJEPALoss, SIGReg


def test_terms_are_what_the_paper_writes() -> None:
    z = torch.randn(5, 20, 8, dtype=torch.float64)
    sigreg = SIGReg(num_slices=16)
    terms = LeJEPALoss(sigreg, lambda_=0.05)(z, 2, step=3)
    mu = z[:2].mean(0)
    prediction = ((z - mu) ** 2).mean()
    statistic = torch.stack([sigreg(view, step=3) for view in z]).mean()
    torch.testing.assert_close(terms.prediction, prediction)
    torch.testing.assert_close(terms.sigreg, statistic)
    torch.testing.assert_close(terms.loss, 0.95 * prediction + 0.05 * statistic)


def test_gradient_flows_through_the_target() -> None:
    """No stop-gradient: a global view also moves because it is part of the mean."""
    z = torch.randn(3, 6, 4, dtype=torch.float64, requires_grad=True)
    LeJEPALoss(SIGReg(num_slices=4), lambda_=0.0)(z, 1, step=0).loss.backward()
    assert z.grad is not None
    assert float(z.grad[0].abs().min()) > 0


def test_predictor_output_replaces_the_views() -> None:
    z, predicted = torch.randn(2, 3, 6, 4, dtype=torch.float64)
    loss = LeJEPALoss(SIGReg(num_slices=4), lambda_=0.1)
    terms = loss(z, 2, step=0, predicted=predicted)
    torch.testing.assert_close(terms.prediction, ((predicted - z[:2].mean(0)) ** 2).mean())
    torch.testing.assert_close(terms.sigreg, loss(z, 2, step=0).sigreg)


@pytest.mark.parametrize(
    ("name", "value"),
    [("lambda_", 1.5), ("lambda_", -0.1), ("lambda_", torch.nan), ("scale_centre", -1.0), ("scale_centre", torch.nan)],
)
def test_weights_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name.strip("_")):
        LeJEPALoss(SIGReg(), **{name: value})
