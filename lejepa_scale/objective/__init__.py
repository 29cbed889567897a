"""The LeJEPA objective: prediction of the global views' mean, and SIGReg or a relative of it."""

from lejepa_scale.objective.loss import LeJEPALoss, LossTerms
from lejepa_scale.objective.regularizer import Regularizer
from lejepa_scale.objective.sigreg import SIGReg
from lejepa_scale.objective.visreg import VISReg
from lejepa_scale.objective.weak_sigreg import WeakSIGReg

__all__ = ["LeJEPALoss", "LossTerms", "Regularizer", "SIGReg", "VISReg", "WeakSIGReg"]
