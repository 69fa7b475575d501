"""Every public function of the functional package documents its arguments, its shapes and where it comes from."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import raysseg.functional

SHAPE = re.compile(r"\[(?:\.\.\.|[A-Za-z0-9+]+)(?:, (?:\.\.\.|[A-Za-z0-9+]+))*\]")
SOURCE = re.compile(r"^\s*Source: .*(?:Eq\. \d|Table \d|\breconstruction\b|EIL, |RALIS, |CiSS-Net, )", re.MULTILINE)


def complaints(function: Callable[..., Any]) -> list[str]:
    """What the docstring of a function lacks."""
    text = inspect.getdoc(function) or ""
    found = []
    if not text:
        return ["has no docstring"]
    if not text.splitlines()[0].endswith("."):
        found.append("does not say in one line what it does")
    if not SHAPE.search(text):
        found.append("gives no shape, as in [B, K, H, W]")
    if not SOURCE.search(text):
        found.append("names no source")
    arguments = text.partition("Args:")[2].partition("Returns:")[0]
    for name in inspect.signature(function).parameters:
        if not re.search(rf"^\s*{name}: \S", arguments, re.MULTILINE):
            found.append(f"does not document {name}")
    return found


def public_functions() -> list[Callable[..., Any]]:
    """All functions without a leading underscore that the package's own modules define."""
    functions: list[Callable[..., Any]] = []
    for info in pkgutil.iter_modules(raysseg.functional.__path__, "raysseg.functional."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if inspect.isfunction(value) and value.__module__ == info.name and not name.startswith("_"):
                functions.append(value)
    return functions


@pytest.mark.parametrize("function", public_functions(), ids=lambda function: str(function.__name__))
def test_a_public_function_is_documented_and_exported(function: Callable[..., Any]) -> None:
    assert not complaints(function), f"{function.__module__}.{function.__name__}: {'; '.join(complaints(function))}"
    assert function.__name__ in raysseg.functional.__all__


def test_the_walk_finds_the_functions() -> None:
    names = {function.__name__ for function in public_functions()}
    assert {
        "infer_labels",
        "contrastive_reward",
        "operator_planes",
        "soft_update",
        "mix",
        "divergence_histograms",
    } <= names


def test_what_lacks_is_noticed() -> None:
    def silent(labels: Tensor) -> Tensor:
        return labels

    def vague(labels: Tensor, window: int) -> Tensor:
        """Dilates

        Args:
            labels: a map.
        """
        return labels + window

    def told(labels: Tensor) -> Tensor:
        """Counts labels.

        Args:
            labels: uint8 [B, H, W].
        Source: EIL, Eq. 1.
        """
        return labels

    assert torch.equal(told(torch.ones(1)), silent(torch.ones(1)))
    assert complaints(silent) == ["has no docstring"]
    assert len(complaints(vague)) == 4
    assert complaints(told) == []
