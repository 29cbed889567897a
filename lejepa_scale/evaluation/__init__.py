"""How good frozen features are: protocols on them, their spectrum, tests of normality, and a picture."""

from lejepa_scale.evaluation.features import Extracted, Features, Kind, extract, raw_pixels
from lejepa_scale.evaluation.isotropy import isotropy, isotropy_table
from lejepa_scale.evaluation.knn import knn
from lejepa_scale.evaluation.linear_probe import linear_probe
from lejepa_scale.evaluation.logistic import logistic
from lejepa_scale.evaluation.metrics import Guesses, Metrics, measure
from lejepa_scale.evaluation.protocols import Options
from lejepa_scale.evaluation.report import as_table
from lejepa_scale.evaluation.suite import Evaluation, Result, evaluate

__all__ = [
    "Evaluation",
    "Extracted",
    "Features",
    "Guesses",
    "Kind",
    "Metrics",
    "Options",
    "Result",
    "as_table",
    "evaluate",
    "extract",
    "isotropy",
    "isotropy_table",
    "knn",
    "linear_probe",
    "logistic",
    "measure",
    "raw_pixels",
]
