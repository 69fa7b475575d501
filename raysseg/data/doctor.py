"""The doctor: says in plain words what is wrong with a dataset before a run finds out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from raysseg.data.store import Store
from raysseg.functional.constants import UNLABELLED

Level = Literal["error", "warning", "info"]

RARE_SHARE = 0.002
"""A class with a smaller share of the labelled pixels of a split is called rare."""

AGREEMENT = 0.95
"""Scribbles that agree with the label on fewer of their pixels are called suspicious."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is to be known about a dataset; `keys` are the samples that it is about, all where empty.

    "error": a run would fail or mean nothing; "warning": probably not meant so; "info": good to know.
    """

    level: Level
    message: str
    keys: tuple[str, ...] = ()


@dataclass(slots=True, kw_only=True)
class _SplitReport:
    """What was counted in one split."""

    name: str
    num_classes: int
    images: int = 0
    label_pixels: np.ndarray = field(init=False)
    scribble_pixels: np.ndarray = field(init=False)
    pixels_with_scribble: int = 0
    compared: int = 0
    agreeing: int = 0
    areas: dict[str, int] = field(default_factory=dict)
    no_label: list[str] = field(default_factory=list)
    void_label: list[str] = field(default_factory=list)
    no_scribble: list[str] = field(default_factory=list)
    empty_scribble: list[str] = field(default_factory=list)
    disagreeing: list[str] = field(default_factory=list)
    missed_classes: list[str] = field(default_factory=list)
    flat_images: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.label_pixels = np.zeros(self.num_classes, np.int64)
        self.scribble_pixels = np.zeros(self.num_classes, np.int64)


def check_dataset(store: Store, *, progress: Callable[[int, int], None] | None = None) -> list[Finding]:
    """Reads every sample once and reports what is wrong, suspicious, or good to know, errors first.

    Args:
        store: the dataset.
        progress: called with the number of samples that are done and that there are.

    Returns:
        findings about image sizes, duplicates, labels, class shares, scribbles and their agreement with the labels.
    """
    findings: list[Finding] = []
    seen: dict[bytes, str] = {}
    twins: list[tuple[str, str]] = []
    reports = []
    done, total = 0, sum(store.splits.values())
    for split in store.splits:
        report = _SplitReport(name=split, num_classes=store.info.num_classes)
        for key in store.keys(split):
            image = store.image(key)
            _examine(report, key, image, store.label(key), store.scribble(key))
            digest = hashlib.blake2b(image.tobytes() + str(image.shape).encode(), digest_size=16).digest()
            if digest in seen:
                twins.append((seen[digest], key))
            else:
                seen[digest] = key
            done += 1
            if progress is not None:
                progress(done, total)
        reports.append(report)
    findings += _about_duplicates(store, twins)
    for report in reports:
        findings += _about_images(report) + _about_labels(report, store) + _about_scribbles(report, store)
    order: dict[Level, int] = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda finding: order[finding.level])


def _examine(
    report: _SplitReport, key: str, image: np.ndarray, label: np.ndarray | None, scribble: np.ndarray | None
) -> None:
    """Counts one sample into its split's report."""
    report.images += 1
    report.areas[key] = image.shape[0] * image.shape[1]
    if int(image.max()) == int(image.min()):
        report.flat_images.append(key)
    if label is None:
        report.no_label.append(key)
    else:
        counts = np.bincount(label.ravel(), minlength=256)[: report.num_classes]
        report.label_pixels += counts
        if counts.sum() == 0:
            report.void_label.append(key)
    if scribble is None:
        report.no_scribble.append(key)
        return
    drawn = np.bincount(scribble.ravel(), minlength=256)[: report.num_classes]
    report.scribble_pixels += drawn
    report.pixels_with_scribble += scribble.size
    if drawn.sum() == 0:
        report.empty_scribble.append(key)
    elif label is not None:
        both = (scribble != UNLABELLED) & (label != UNLABELLED)
        equal = int((scribble[both] == label[both]).sum())
        report.compared += int(both.sum())
        report.agreeing += equal
        if equal < AGREEMENT * both.sum():
            report.disagreeing.append(key)
        if bool(((counts > 0) & (drawn == 0)).any()):
            report.missed_classes.append(key)


def _about_duplicates(store: Store, twins: list[tuple[str, str]]) -> list[Finding]:
    """Images that are the same to the last bit; across splits they spoil the evaluation."""
    home = {key: split for split in store.splits for key in store.keys(split)}
    across = [pair for pair in twins if home[pair[0]] != home[pair[1]]]
    within = [pair for pair in twins if home[pair[0]] == home[pair[1]]]
    findings = []
    if across:
        splits = " and ".join(sorted({home[key] for key in across[0]}))
        message = f"{_count(across, 'image')} in both {splits}: the evaluation would be too good"
        findings.append(Finding(level="error", message=message, keys=_flat(across)))
    if within:
        message = f"{_count(within, 'image')} twice in the same split"
        findings.append(Finding(level="warning", message=message, keys=_flat(within)))
    return findings


def _about_images(report: _SplitReport) -> list[Finding]:
    findings = []
    areas = np.array(list(report.areas.values()))
    middle = float(np.median(areas))
    odd = [key for key, area in report.areas.items() if not middle / 4 <= area <= middle * 4]
    if odd:
        message = f"{report.name}: {_count(odd, 'image')} less than a quarter or more than four times as large as usual"
        findings.append(Finding(level="warning", message=message, keys=tuple(odd)))
    if report.flat_images:
        message = f"{report.name}: {_count(report.flat_images, 'image')} of one single value"
        findings.append(Finding(level="warning", message=message, keys=tuple(report.flat_images)))
    message = f"{report.name}: {report.images} images of {areas.min()} to {areas.max()} pixels"
    findings.append(Finding(level="info", message=message))
    return findings


def _about_labels(report: _SplitReport, store: Store) -> list[Finding]:
    findings = []
    if len(report.no_label) == report.images:
        message = f"{report.name}: no image has a label, so nothing can be evaluated on it"
        return [Finding(level="warning", message=message)]
    if report.no_label:
        message = f"{report.name}: {_count(report.no_label, 'image')} without a label"
        findings.append(Finding(level="warning", message=message, keys=tuple(report.no_label)))
    if report.void_label:
        message = f"{report.name}: {_count(report.void_label, 'label')} without a single labelled pixel"
        findings.append(Finding(level="warning", message=message, keys=tuple(report.void_label)))
    shares = report.label_pixels / max(int(report.label_pixels.sum()), 1)
    names = store.info.class_names
    absent = [name for name, share in zip(names, shares, strict=True) if share == 0]
    if absent:
        message = f"{report.name}: no label holds the class {_listed(absent)}"
        findings.append(Finding(level="warning", message=message))
    rare = [
        f"{name} ({100 * share:.2g} %)" for name, share in zip(names, shares, strict=True) if 0 < share < RARE_SHARE
    ]
    if rare:
        message = f"{report.name}: of the labelled pixels hardly any are {_listed(rare)}"
        findings.append(Finding(level="info", message=message))
    listed = ", ".join(f"{name} {100 * share:.1f}" for name, share in zip(names, shares, strict=True))
    findings.append(Finding(level="info", message=f"{report.name}: share of the labelled pixels in per cent: {listed}"))
    return findings


def _about_scribbles(report: _SplitReport, store: Store) -> list[Finding]:
    if len(report.no_scribble) == report.images:
        return [Finding(level="info", message=f"{report.name}: no scribbles")]
    findings = []
    if report.no_scribble:
        message = f"{report.name}: {_count(report.no_scribble, 'image')} without a scribble, though others have one"
        findings.append(Finding(level="error", message=message, keys=tuple(report.no_scribble)))
    if report.empty_scribble:
        message = f"{report.name}: {_count(report.empty_scribble, 'scribble')} without a single labelled pixel"
        findings.append(Finding(level="error", message=message, keys=tuple(report.empty_scribble)))
    if report.disagreeing:
        message = (
            f"{report.name}: {_count(report.disagreeing, 'scribble')} with more than {100 - 100 * AGREEMENT:.0f} % of "
            "their pixels on another class than the label"
        )
        findings.append(Finding(level="warning", message=message, keys=tuple(report.disagreeing)))
    if report.missed_classes:
        message = f"{report.name}: {_count(report.missed_classes, 'scribble')} without a class that is in the label"
        findings.append(Finding(level="info", message=message, keys=tuple(report.missed_classes)))
    names = store.info.class_names
    undrawn = [k for k, count in enumerate(report.scribble_pixels) if count == 0]
    # A class that the labels do not hold either is an odd class list, not a defect of the scribbles.
    forgotten = [names[k] for k in undrawn if report.label_pixels[k] > 0]
    if forgotten:
        message = (
            f"{report.name}: no scribble holds the class {_listed(forgotten)}, though labels do; it is never learned"
        )
        findings.append(Finding(level="error", message=message))
    unknown = [names[k] for k in undrawn if report.label_pixels[k] == 0]
    if unknown:
        message = f"{report.name}: no scribble holds the class {_listed(unknown)}"
        findings.append(Finding(level="warning", message=message))
    share = 100 * int(report.scribble_pixels.sum()) / report.pixels_with_scribble
    message = f"{report.name}: scribbles cover {share:.2f} % of the pixels"
    if report.compared:
        message += f" and agree with the labels on {100 * report.agreeing / report.compared:.2f} % of them"
    findings.append(Finding(level="info", message=message))
    return findings


def _count(items: Iterable[object], noun: str) -> str:
    number = len(list(items))
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"


def _flat(pairs: list[tuple[str, str]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(key for pair in pairs for key in pair))
