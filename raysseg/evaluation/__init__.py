"""How good a segmentation is: inference on whole images, and the scores of a set."""

from raysseg.evaluation.counts import Counts
from raysseg.evaluation.inference import PAPER_SCALES, predict_probabilities, predict_steps
from raysseg.evaluation.instances import InstanceScores, instance_sums, tells_objects_apart
from raysseg.evaluation.metrics import Scores, confusion_matrix

__all__ = [
    "PAPER_SCALES",
    "Counts",
    "InstanceScores",
    "Scores",
    "confusion_matrix",
    "instance_sums",
    "predict_probabilities",
    "predict_steps",
    "tells_objects_apart",
]
