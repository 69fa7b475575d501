"""Label Studio's brush masks: the RGBA picture of a brush as a packed run-length code, a list of bytes.

A stream of bits, the highest first: 32 for the number of words, 5 for the bits per word minus one, and four times 4 for the
sizes minus one of the run lengths. Then, until there are as many words: one bit (1: one word repeated; 0: all words
follow), two bits that choose a size, the run length minus one in that size, and the word or words. The words are the red,
green, blue and alpha of every pixel, row by row; a pixel is painted where its alpha is.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raysseg.errors import InputError

_SIZES = (3, 4, 8, 16)
_WORD = 8
_CHANNELS = 4
_OPAQUE = 128


def encode_brush(mask: np.ndarray) -> list[int]:
    """Returns the code of a mask.

    Args:
        mask: bool [H, W], True where the brush painted.
    """
    flat = mask.reshape(-1)
    starts = np.concatenate(([0], np.flatnonzero(flat[1:] != flat[:-1]) + 1))
    lengths: np.ndarray = np.diff(np.append(starts, flat.size)) * _CHANNELS
    bits = [f"{flat.size * _CHANNELS:032b}", f"{_WORD - 1:05b}", *(f"{size - 1:04b}" for size in _SIZES)]
    for painted, length in zip(flat[starts].tolist(), lengths.tolist(), strict=True):
        while length > 0:
            run = min(length, 1 << _SIZES[-1])
            choice = next(index for index, size in enumerate(_SIZES) if run <= 1 << size)
            bits.append(f"1{choice:02b}{run - 1:0{_SIZES[choice]}b}{255 * painted:0{_WORD}b}")
            length -= run
    stream = "".join(bits)
    stream += "0" * (-len(stream) % 8)
    return list(int(stream, 2).to_bytes(len(stream) // 8, "big"))


def decode_brush(code: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Returns where a brush painted.

    Args:
        code: bytes as numbers 0…255.
        size: (H, W) of the picture in pixels.

    Returns:
        bool [H, W].

    Raises:
        InputError: the code is damaged, or of a picture of another size.
    """
    try:
        stream = _Bits(bytes(code))
    except (ValueError, TypeError):
        raise InputError(
            "The brush's code holds something that is no byte; numbers from 0 to 255 are expected."
        ) from None
    height, width = size
    count = stream.number(32)
    if count != height * width * _CHANNELS:
        raise InputError(
            f"The brush's code is of {count} values; {height * width * _CHANNELS} are expected for {width}×{height} pixels."
        )
    word = stream.number(5) + 1
    sizes = [stream.number(4) + 1 for _ in range(4)]
    values: np.ndarray = np.zeros(count, dtype=np.int64)
    done = 0
    while done < count:
        repeated = stream.number(1)
        length = stream.number(sizes[stream.number(2)]) + 1
        if done + length > count:
            raise InputError(f"The brush's code holds more than the {count} values that it announces.")
        values[done : done + length] = stream.number(word) if repeated else stream.numbers(word, length)
        done += length
    alpha = values.reshape(height, width, _CHANNELS)[..., -1]
    return alpha >= _OPAQUE


class _Bits:
    """A stream of bits, the highest of every byte first."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._bits = np.unpackbits(np.frombuffer(content, dtype=np.uint8))
        self._place = 0

    def number(self, bits: int) -> int:
        """The next bits as a number."""
        start, self._place = self._place, self._take(bits)
        window = self._content[start // 8 : -(-self._place // 8)]
        return int.from_bytes(window, "big") >> (-self._place % 8) & ((1 << bits) - 1)

    def numbers(self, bits: int, count: int) -> np.ndarray:
        """The next `count` numbers of so many bits each, int64 [count]."""
        start, self._place = self._place, self._take(bits * count)
        table = self._bits[start : self._place].reshape(count, bits)
        return table @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))

    def _take(self, bits: int) -> int:
        end = self._place + bits
        if end > len(self._bits):
            raise InputError("The brush's code ends too early.")
        return end
