"""Makes minibatches ready in a background thread while the learner computes, on a copy stream of its own on a GPU.

    background thread   read 2 ──▶ read 3 ──▶ …             (decode, gather, pin, copy; on a GPU in the copy stream)
                           │ event      │ event
    learner             pass 1 ──▶ pass 2 ──▶ pass 3        (waits only for a minibatch that is not ready yet)

Only data are read ahead, never anything that depends on a network: label maps and images of a version never change, so
nothing that was read can be out of date. What was read for one job is used for an equal job and for no other.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

import numpy as np
import torch

from raysseg.core.workspace import Workspace
from raysseg.data.batches import DeviceDataset

Job = TypeVar("Job")
Ready = TypeVar("Ready")


class Prefetcher(Generic[Job, Ready]):
    """Runs `prepare` for coming jobs. To be used from one thread.

    Args:
        prepare: makes a job ready; it is never run twice at the same time.
        depth: jobs that are made ready ahead of the one in use; 0 prepares each when it is asked for, without a thread.
        device: where what is prepared is used.
    """

    def __init__(self, prepare: Callable[[Job], Ready], depth: int, device: torch.device) -> None:
        self.waited = 0.0
        """Seconds that the caller waited for jobs, all together."""
        self._prepare = prepare
        self._depth = depth
        self._device = device
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch") if depth else None
        self._stream = torch.cuda.Stream(device) if depth and device.type == "cuda" else None
        self._begun: deque[tuple[Job, Future[tuple[Ready, Any]]]] = deque()

    def begin(self, job: Job) -> None:
        """Makes a job ready in the background, for a later `each` or `take` that asks for an equal one."""
        if self._pool is not None:
            self._begun.append((job, self._pool.submit(self._run, lambda: self._prepare(job))))

    def each(self, jobs: Iterable[Job]) -> Iterator[Ready]:
        """Yields jobs in order, each made ready; while one is in use the next `depth` are made ready.

        An exception of `prepare` comes out here; what was begun after it is dropped.
        """
        waiting = deque(jobs)
        try:
            while waiting:
                job = waiting.popleft()
                ready = self.take(job)
                for following in list(waiting)[len(self._begun) : self._depth]:
                    self.begin(following)
                yield ready
        finally:
            if waiting:
                self.drop()

    def take(self, job: Job) -> Ready:
        """Returns one job made ready: as it was begun, or else prepared now; everything else that was begun is dropped
        where the next job begun is not this one.
        """
        start = time.perf_counter()
        try:
            if self._begun and self._begun[0][0] == job:
                future = self._begun.popleft()[1]
                try:
                    ready, event = future.result()
                except BaseException:
                    self.drop()
                    raise
            else:
                self.drop()
                ready, event = self._run(lambda: self._prepare(job))
            if event is not None:
                self._hand_over(ready, event)
            return ready
        finally:
            self.waited += time.perf_counter() - start

    def now(self, function: Callable[[], Ready]) -> Ready:
        """Runs a function that touches the same data as `prepare`, in this thread but not beside it."""
        ready, event = self._run(function)
        if event is not None:
            self._hand_over(ready, event)
        return ready

    def drop(self) -> None:
        """Forgets what was begun; what is running ends by itself."""
        for _, future in self._begun:
            future.cancel()
        self._begun.clear()

    def close(self) -> None:
        """Ends the thread."""
        self.drop()
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def _run(self, function: Callable[[], Any]) -> tuple[Any, Any]:
        """Runs a function alone, on the copy stream where there is one; returns its result and the event of its end."""
        with self._lock, torch.no_grad():
            if self._stream is None:
                return function(), None
            with torch.cuda.stream(self._stream):
                result = function()
                event = torch.cuda.Event()
                event.record()
            return result, event

    def _hand_over(self, ready: Any, event: Any) -> None:
        """Lets the compute stream wait, and keeps the memory until that stream is done with it."""
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        for tensor in tensors_of(ready):
            if tensor.is_cuda:
                tensor.record_stream(stream)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ReadRows:
    """Rows of a split that were read ahead; they answer in the split's place.

    Args:
        canvas: (H, W) of the split.
        pixels: uint8 `[B, 3, H, W]`.
        sizes: (H, W) of each image, int64 `[B, 2]`.
        maps: by label version, uint8 `[B, H, W]`.
    """

    canvas: tuple[int, int]
    pixels: torch.Tensor
    sizes: torch.Tensor
    maps: dict[int, torch.Tensor]

    @classmethod
    def read(cls, split: DeviceDataset, rows: torch.Tensor, versions: set[int]) -> ReadRows:
        """Reads images and label maps.

        Args:
            split: where they are.
            rows: int64 `[B]`.
            versions: of the label maps.
        """
        pixels, sizes = split.images(rows)
        maps = {version: split.labels(rows, version) for version in sorted(versions)}
        return cls(canvas=split.canvas, pixels=pixels, sizes=sizes, maps=maps)

    def images(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `DeviceDataset.images` gave for these rows.

        Args:
            rows: those that were read.
        """
        return self.pixels, self.sizes

    def labels(self, rows: torch.Tensor, version: int) -> torch.Tensor:
        """Returns what `DeviceDataset.labels` gave for these rows.

        Args:
            rows: those that were read.
            version: one of those that were read.
        """
        return self.maps[version]


class ReadWorkspace(Workspace):
    """A workspace whose training split is some rows of it that were read ahead.

    Args:
        workspace: the whole one.
        rows: what was read.
    """

    def __init__(self, workspace: Workspace, rows: ReadRows) -> None:
        self.settings = workspace.settings
        self.device = workspace.device
        self.store = workspace.store
        self.label_store = workspace.label_store
        self._splits = {workspace.settings.data.train_split: rows}  # type: ignore[dict-item]


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Yields the tensors in nested tuples, lists, dicts and dataclasses. Source: design."""
    if isinstance(value, torch.Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors_of(getattr(value, field.name))
    elif isinstance(value, dict):
        for one in value.values():
            yield from tensors_of(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from tensors_of(one)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copies an array to a device; to a GPU from pinned memory, without waiting for it. Source: design."""
    tensor = torch.from_numpy(np.array(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
