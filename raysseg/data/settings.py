"""Which data a run uses, and how they become a store: built once into a cache, opened ever after."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from raysseg.configuration import Settings
from raysseg.data.readers import (
    Ade20kReader,
    CamvidReader,
    CityscapesReader,
    FolderReader,
    FolderSettings,
    PascalContextReader,
    PascalContextSettings,
    Reader,
    SampleFiles,
    VocReader,
    VocSettings,
)
from raysseg.data.sample import DatasetInfo, Sample
from raysseg.data.scribbles import ScribbleSettings
from raysseg.data.store import SCHEMA_VERSION, Store, write_store
from raysseg.data.synthetic import GENERATOR_VERSION, SyntheticSettings, synthetic_info, synthetic_samples
from raysseg.errors import InputError

CACHE_VERSION = 1
"""Rises with every change of the readers or of the scribble generator that alters what a store holds."""

Track = Callable[[Iterable[Sample], int], Iterable[Sample]]
"""Passes samples on while showing how many of how many are done."""


class DataSettings(Settings):
    """Where the samples come from and which scribbles they carry."""

    source: Literal["synthetic", "store", "folder", "ade20k", "camvid", "cityscapes", "pascal_context", "voc"] = Field(
        default="synthetic", description="Kind of data: made from a seed, a built store, or a public format. [R]"
    )
    path: str | None = Field(default=None, description="Folder of the data; of a store also a pyarrow.fs URI. [R]")
    train_split: str = Field(default="train", description="Split that is trained on. [P] VOC: train or train_aug.")
    val_split: str = Field(default="val", description="Split that is evaluated on. [P]")
    train_every: int = Field(
        default=1, ge=1, description="Keeps every n-th training image, in the files' order; 1 keeps all of them. [R]"
    )
    scribbles: Literal["given", "generate", "none"] = Field(
        default="given",
        description="Scribbles of the training images: those that came with the data, made from the labels, or none. "
        "Synthetic scenes and a CamVid without scribbles have theirs made, too. [R]",
    )
    generate: ScribbleSettings = Field(default_factory=ScribbleSettings, description="How scribbles are made. [R]")
    image_encoding: Literal["raw", "png"] = Field(
        default="raw", description="How a store that is built holds images: raw is read faster, png is smaller. [R]"
    )
    synthetic: SyntheticSettings = Field(default_factory=SyntheticSettings, description="Of the source synthetic. [R]")
    folder: FolderSettings = Field(default_factory=FolderSettings, description="Of the source folder. [R]")
    pascal_context: PascalContextSettings = Field(
        default_factory=PascalContextSettings, description="Of the source pascal_context. [R]"
    )
    voc: VocSettings = Field(default_factory=VocSettings, description="Of the source voc. [R]")

    @model_validator(mode="after")
    def _check(self) -> DataSettings:
        if self.source == "synthetic":
            if self.path is not None:
                raise ValueError("path has no effect with the source 'synthetic'")
            for key in ("train_split", "val_split"):
                if getattr(self, key) not in ("train", "val"):
                    raise ValueError(f"{key} is '{getattr(self, key)}', but synthetic scenes have 'train' and 'val'")
        elif not self.path:
            raise ValueError(f"the source '{self.source}' needs a path")
        for key in ("synthetic", "folder", "pascal_context", "voc"):
            if key != self.source and getattr(self, key) != type(getattr(self, key))():
                raise ValueError(f"the settings of '{key}' have no effect with the source '{self.source}'")
        if self.source == "folder" and not self.folder.names:
            raise ValueError("the source 'folder' needs folder.class_names, by name or by number")
        if self.train_every != 1 and self.source in ("synthetic", "store"):
            raise ValueError(f"train_every has no effect with the source '{self.source}'")
        if self.source == "store" and self.scribbles == "generate":
            raise ValueError(
                "a store keeps the scribbles that it was built with; build another one with scribbles 'generate'"
            )
        if self.source == "store" and self.image_encoding != "raw":
            raise ValueError("image_encoding has no effect with the source 'store'")
        made = self.scribbles == "generate" or (self.scribbles == "given" and self.source in ("synthetic", "camvid"))
        if self.generate != ScribbleSettings() and not made:
            raise ValueError(f"the settings of 'generate' have no effect with scribbles '{self.scribbles}'")
        return self

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are read, each once, the training split first."""
        return tuple(dict.fromkeys((self.train_split, self.val_split)))


def open_dataset(settings: DataSettings, cache_dir: str | os.PathLike[str], *, track: Track | None = None) -> Store:
    """Opens the store of the settings; builds it into `cache_dir/<source>-<hash>` where it is not there yet.

    The hash covers the settings and, for files, their names, sizes and times of change.

    Args:
        settings: which data.
        cache_dir: local folder for built stores.
        track: shows progress while a store is built.

    Raises:
        InputError: where a file, a split or a training image's scribble is missing or wrong.
    """
    if settings.source == "store":
        return _open_store(settings)
    plan = _Plan(settings)
    target = Path(cache_dir) / f"{settings.source}-{plan.digest()}"
    if not target.exists():
        try:
            return plan.write(target, track)
        except InputError:
            # Another process may have built the same store in the meantime; a store exists entirely or not at all.
            if not target.exists():
                raise
    return Store.open(target)


def build_store(settings: DataSettings, uri: str | os.PathLike[str], *, track: Track | None = None) -> Store:
    """Builds the store of the settings at a place of one's own choice, a new folder or `pyarrow.fs` URI.

    Raises:
        InputError: as `open_dataset`; where the source is a store already; where `uri` exists.
    """
    if settings.source == "store":
        raise InputError(f"'{settings.path}' is named as a store already; a source to build from is expected.")
    return _Plan(settings).write(uri, track)


def _open_store(settings: DataSettings) -> Store:
    assert settings.path is not None
    store = Store.open(settings.path)
    for split in settings.splits:
        store.keys(split)
    if settings.scribbles == "given":
        keys = store.keys(settings.train_split)
        # Over a network the first image stands for all: reading every row would fetch the whole dataset.
        for key in keys if "://" not in settings.path else keys[:1]:
            if store.scribble(key) is None:
                raise InputError(_missing_scribble(key, settings))
    return store


def _missing_scribble(key: str, settings: DataSettings) -> str:
    return (
        f"The training image '{key}' of '{settings.path}' has no scribble; draw one, or make them from the labels "
        "with scribbles: generate."
    )


class _Plan:
    """What a store will hold, known before anything is decoded."""

    def __init__(self, settings: DataSettings) -> None:
        self._settings = settings
        self._files: list[SampleFiles] = []
        self._reader: Reader | None = None
        self._made = settings.scribbles == "generate"
        if settings.source == "synthetic":
            counts = {"train": settings.synthetic.train_images, "val": settings.synthetic.val_images}
            self.total = sum(counts[split] for split in settings.splits)
            return
        self._reader = _reader(settings)
        for split in settings.splits:
            files = self._reader.files(split)
            self._files += files[:: settings.train_every] if split == settings.train_split else files
        seen: dict[str, str] = {}
        for one in self._files:
            if one.key in seen:
                raise InputError(f"The image '{one.key}' is in the split '{one.split}' and in '{seen[one.key]}'.")
            seen[one.key] = one.split
        has_scribbles = any(files.scribble for files in self._files if files.split == settings.train_split)
        if settings.source == "camvid" and settings.scribbles == "given" and not has_scribbles:
            self._made = True
        if settings.scribbles != "given" or self._made:
            self._files = [files.without_scribble() for files in self._files]
        else:
            missing = next((f for f in self._files if f.split == settings.train_split and f.scribble is None), None)
            if missing is not None:
                raise InputError(_missing_scribble(missing.key, settings))
        self.total = len(self._files)

    def digest(self) -> str:
        """Twelve hexadecimal digits that change with the settings, the files and the code that reads them."""
        listing = []
        for files in self._files:
            for path in files.paths():
                status = path.stat()
                listing.append((files.key, files.split, str(path.resolve()), status.st_size, status.st_mtime_ns))
        versions = (CACHE_VERSION, GENERATOR_VERSION, SCHEMA_VERSION)
        content = json.dumps([versions, self._settings.model_dump(mode="json"), listing])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def write(self, uri: str | os.PathLike[str], track: Track | None) -> Store:
        """Reads everything and writes the store."""
        samples: Iterable[Sample] = self._samples()
        if track is not None:
            samples = track(samples, self.total)
        return write_store(uri, samples, self._info(), image_encoding=self._settings.image_encoding)

    def _info(self) -> DatasetInfo:
        if self._reader is None:
            return synthetic_info()
        info = self._reader.info
        if not self._made:
            return info
        how = self._settings.generate
        note = f"{info.source}; scribbles generated (share {how.share:g}, width {how.width}, seed {how.seed})"
        return dataclasses.replace(info, source=note)

    def _samples(self) -> Iterator[Sample]:
        settings = self._settings
        if self._reader is None:
            for sample in synthetic_samples(settings.synthetic, settings.generate, settings.splits):
                yield dataclasses.replace(sample, scribble=None) if settings.scribbles == "none" else sample
            return
        for files in self._files:
            sample = self._reader.read(files)
            if self._made and files.split == settings.train_split:
                sample = dataclasses.replace(sample, scribble=self._generated(sample))
            yield sample

    def _generated(self, sample: Sample) -> np.ndarray:
        assert self._reader is not None
        if sample.label is None:
            raise InputError(f"The training image '{sample.key}' has no label, from which its scribble could be made.")
        return self._settings.generate.for_label(sample.label, sample.key, self._reader.info.num_classes)


def _reader(settings: DataSettings) -> Reader:
    assert settings.path is not None
    root = Path(settings.path).expanduser()
    if settings.source == "folder":
        return FolderReader(root, settings.folder)
    if settings.source == "ade20k":
        return Ade20kReader(root)
    if settings.source == "camvid":
        return CamvidReader(root)
    if settings.source == "cityscapes":
        return CityscapesReader(root)
    if settings.source == "pascal_context":
        return PascalContextReader(root, settings.pascal_context)
    return VocReader(root, settings.voc)
