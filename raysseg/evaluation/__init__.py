"""How good a segmentation is: inference on whole images, and the scores of a set."""

from raysseg.evaluation.inference import PAPER_SCALES, predict_probabilities, predict_steps
from raysseg.evaluation.metrics import Scores, confusion_matrix

__all__ = ["PAPER_SCALES", "Scores", "confusion_matrix", "predict_probabilities", "predict_steps"]
