"""How good frozen features are: k-NN, a linear probe, their spectrum, tests of normality, and a picture."""

from lejepa_scale.evaluation.features import Features, extract, raw_pixels
from lejepa_scale.evaluation.isotropy import isotropy, isotropy_table
from lejepa_scale.evaluation.knn import knn_accuracy
from lejepa_scale.evaluation.linear import linear_accuracy
from lejepa_scale.evaluation.protocol import Evaluation, evaluate
from lejepa_scale.evaluation.report import Scores, as_table, score

__all__ = [
    "Evaluation",
    "Features",
    "Scores",
    "as_table",
    "evaluate",
    "extract",
    "isotropy",
    "isotropy_table",
    "knn_accuracy",
    "linear_accuracy",
    "raw_pixels",
    "score",
]
