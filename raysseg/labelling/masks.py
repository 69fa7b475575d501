"""Label maps as files that are named by what they hold: index PNGs that any viewer opens, none of them ever changed."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image

from raysseg.core.replay_files import sync_folder
from raysseg.errors import InputError
from raysseg.labelling.durable import write_durably


def mask_digest(mask: np.ndarray) -> str:
    """Returns the name of a label map uint8 [h, w]: 40 hexadecimal digits over its size and its values."""
    height, width = mask.shape
    head = f"{height}x{width}:".encode()
    return hashlib.sha256(head + np.ascontiguousarray(mask).tobytes()).hexdigest()[:40]


class MaskFolder:
    """A folder of label maps by their digest; a file that was damaged or lost is made again when its label map comes again.

    Args:
        path: the folder, which exists.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, mask: np.ndarray) -> str:
        """Keeps a label map uint8 [h, w] and returns its digest, once it would survive a power cut.

        Raises:
            InputError: the disk refuses.
        """
        digest = mask_digest(mask)
        path = self._path / f"{digest}.png"
        if self._holds(digest):
            # Whoever wrote it may have been killed before the name was safe.
            sync_folder(self._path)
            return digest
        stream = io.BytesIO()
        Image.fromarray(mask).save(stream, format="PNG")
        write_durably(path, stream.getvalue())
        return digest

    def get(self, digest: str) -> np.ndarray:
        """Returns the label map uint8 [h, w] of a digest.

        Raises:
            InputError: its file is missing, or holds something else.
        """
        path = self._path / f"{digest}.png"
        try:
            with Image.open(path) as picture:
                mask = np.asarray(picture)
        except FileNotFoundError:
            raise InputError(f"The answer's label map {path} is missing; put a copy of the file there.") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise InputError(f"The answer's label map {path} cannot be read: {error}") from None
        if mask.dtype != np.uint8 or mask.ndim != 2 or mask_digest(mask) != digest:
            raise InputError(f"The answer's label map {path} is not what its name says; put a copy of it in its place.")
        return mask

    def _holds(self, digest: str) -> bool:
        try:
            self.get(digest)
        except InputError:
            return False
        return True
