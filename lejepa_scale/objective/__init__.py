"""The LeJEPA objective: prediction of the global views' mean, and SIGReg."""

from lejepa_scale.objective.loss import LeJEPALoss, LossTerms
from lejepa_scale.objective.sigreg import SIGReg

__all__ = ["LeJEPALoss", "LossTerms", "SIGReg"]
