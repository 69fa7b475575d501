"""The two reserved values of a label map; every other value is a class 0…K−1."""

UNLABELLED = 255
"""A pixel of the image that carries no label (also: ignore)."""

PADDING = 254
"""Not a pixel of the image: never a candidate, never counted, never trained on."""

MAX_CLASSES = 254
"""Classes are 0…253 at the most, below the reserved values."""
