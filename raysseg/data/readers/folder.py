"""A plain folder: `<split>/{images,labels,scribbles}/<name>.<ending>`, labels and scribbles as index PNGs."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from raysseg.configuration import Settings
from raysseg.data.readers.images import SampleFiles, match_by_stem, read_sample
from raysseg.data.sample import DatasetInfo, Sample, default_palette
from raysseg.errors import InputError, nearest_name
from raysseg.functional.constants import MAX_CLASSES, UNLABELLED


class FolderSettings(Settings):
    """What a plain folder does not say about itself."""

    class_names: int | tuple[str, ...] = Field(
        default=0, description="Names of the classes 0…K−1 in order, or only their number K. [R]"
    )
    ignore_index: int = Field(
        default=UNLABELLED, ge=0, le=255, description="Value of the labels that means 'not labelled'. [R]"
    )
    scribble_unlabelled: int = Field(
        default=UNLABELLED,
        ge=0,
        le=255,
        description="Value of the scribbles that means 'no stroke here'; ACDC has 4. [R]",
    )
    has_background: bool = Field(default=True, description="Whether class 0 is the background. [R]")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the classes; 'class 0', 'class 1', … where only their number is given."""
        if isinstance(self.class_names, int):
            return tuple(f"class {k}" for k in range(self.class_names))
        return self.class_names

    @model_validator(mode="after")
    def _check(self) -> FolderSettings:
        names = self.names
        if len(names) > MAX_CLASSES:
            raise ValueError(f"class_names has {len(names)} classes; {MAX_CLASSES} at most are expected")
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"class_names holds '{twice}' twice")
        for key in ("ignore_index", "scribble_unlabelled"):
            value = getattr(self, key)
            if value < len(names):
                raise ValueError(
                    f"{key} is {value}, but {value} is the class '{names[value]}'; {len(names)} to 255 is expected"
                )
        return self


class FolderReader:
    """Reads `root/<split>/{images,labels,scribbles}`; keys are `<split>-<name>`.

    Raises:
        InputError: where `root` is no folder or the settings name no classes.
    """

    def __init__(self, root: Path, settings: FolderSettings) -> None:
        if not root.is_dir():
            raise InputError(f"The folder '{root}' does not exist.")
        if not settings.names:
            raise InputError(
                f"The classes of the folder '{root}' are not known: give class_names, by name or by number."
            )
        self._root = root
        self._settings = settings
        self.info = DatasetInfo(
            name=root.resolve().name,
            class_names=settings.names,
            palette=default_palette(len(settings.names)),
            has_background=settings.has_background,
            source="a folder of images",
        )

    def files(self, split: str) -> list[SampleFiles]:
        """Files of a split by name; raises InputError where there is no such split or a file has no image."""
        folder = self._root / split
        if not (folder / "images").is_dir():
            splits = [path.parent.name for path in self._root.glob("*/images")]
            raise InputError(f"'{folder / 'images'}' does not exist: no split '{split}'{nearest_name(split, splits)}")
        labels, scribbles = (path if path.is_dir() else None for path in (folder / "labels", folder / "scribbles"))
        return match_by_stem(folder / "images", labels, scribbles, split=split, key_prefix=f"{split}-")

    def read(self, files: SampleFiles) -> Sample:
        """Reads one sample; raises InputError where a file is wrong."""
        settings = self._settings
        return read_sample(files, self.info, ignore=[settings.ignore_index], unlabelled=[settings.scribble_unlabelled])
