"""Kills processes that add answers to a ledger, at random moments, and checks after every kill what is on the disk.

    python killed_ledger.py FOLDER KILLS SEED

A process of its own, so that forking is cheap: it imports neither torch nor Ray. Prints one line of JSON.
"""

from __future__ import annotations

import io
import json
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from raysseg.labelling.ledger import Ledger, read_answers, read_mask

KILLS_PER_LEDGER = 50
LONGEST = 0.02
"""Seconds within which a process is killed, after it was forked or after it opened the ledger."""

OPENED = -1
"""What a process says in place of an answer's number once it has opened the ledger."""


def mask_of(number: int) -> np.ndarray:
    """The answer for the region of a number; some regions share one."""
    return np.random.default_rng(number // 3).integers(0, 5, (12, 16), dtype=np.uint8)


def write_slowly(choose: random.Random) -> None:
    """Makes writing take its time, as on a slow disk: many kills then find half a line, or a label map without its name."""
    write, sync = os.pwrite, os.fsync

    def write_some(descriptor: int, data: bytes, at: int) -> int:
        time.sleep(0.0003)
        return write(descriptor, data[: choose.randint(1, 40)], at)

    def sync_late(descriptor: int) -> None:
        time.sleep(0.0005)
        sync(descriptor)

    os.pwrite, os.fsync = write_some, sync_late


def answer(folder: Path, acknowledged: int, slow: random.Random | None) -> None:
    """Adds answers of regions, the last ones that are known again, and acknowledges each."""
    if slow is not None:
        write_slowly(slow)
    with Ledger(folder) as ledger:
        os.write(acknowledged, struct.pack("<i", OPENED))
        # Each that is known already takes time, after which few processes would live to write anything new.
        number = max(0, len(ledger.answers) - 3)
        while True:
            outcome = ledger.add(f"region {number}", mask_of(number), round_number=1, source="a file")
            assert outcome != "different", number
            os.write(acknowledged, struct.pack("<i", number))
            number += 1
            # On a disk in memory a process would otherwise add answers by the thousand, which only take time to check.
            time.sleep(0.0005)


def kill_one(folder: Path, choose: random.Random) -> int:
    """Starts a process that answers, kills it, and returns how many answers are acknowledged, the last of them by it."""
    reading, writing = os.pipe()
    slow = random.Random(choose.random()) if choose.random() < 0.35 else None
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            answer(folder, writing, slow)
        finally:
            os._exit(1)
    os.close(writing)
    if choose.random() < 0.8:
        assert os.read(reading, 4) == struct.pack("<i", OPENED)
    time.sleep(choose.uniform(0, LONGEST))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"the process ended by itself with {status}"
    with os.fdopen(reading, "rb") as stream:
        said = [number for (number,) in struct.iter_unpack("<i", stream.read())]
    numbers = [number for number in said if number != OPENED]
    assert not numbers or numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return numbers[-1] + 1 if numbers else 0


def main(root: Path, kills: int, seed: int) -> dict[str, int]:
    """Kills that many processes; returns how often what was met."""
    # Pillow loads its formats at the first picture; forked processes then have them and come to the ledger at once.
    Image.fromarray(mask_of(0)).save(io.BytesIO(), format="PNG")
    choose = random.Random(seed)
    seen = {"kills": 0, "answers": 0, "torn": 0, "set_aside": 0, "partial": 0, "lost": 0, "wrong": 0}
    while seen["kills"] < kills:
        folder = root / f"ledger-{seen['kills']:04d}"
        acknowledged, checked = 0, 0
        for _ in range(min(KILLS_PER_LEDGER, kills - seen["kills"])):
            acknowledged = max(acknowledged, kill_one(folder, choose))
            seen["kills"] += 1
            answers, torn = read_answers(folder)
            seen["torn"] += torn > 0
            seen["lost"] += len(answers) < acknowledged
            seen["partial"] += any(folder.rglob(".*.partial"))
            listed = list(answers.values())
            seen["wrong"] += [one.region for one in listed] != [f"region {number}" for number in range(len(listed))]
            for number in range(checked, len(listed)):
                seen["wrong"] += not np.array_equal(read_mask(folder, listed[number]), mask_of(number))
            checked = len(listed)
        # One process that is left alone finds everything that was written, each answer once.
        with Ledger(folder) as ledger:
            seen["wrong"] += len(ledger.answers) != checked
            for number, one in enumerate(ledger.answers.values()):
                seen["wrong"] += not np.array_equal(read_mask(folder, one), mask_of(number))
        lines = (folder / "lines.jsonl").read_bytes().splitlines()
        seen["wrong"] += (
            len(lines) != checked or len({json.loads(line)["entry"]["region"] for line in lines}) != checked
        )
        seen["answers"] += checked
        seen["set_aside"] += len(list(folder.glob("torn-*.bin")))
    return seen


if __name__ == "__main__":
    assert "torch" not in sys.modules
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
