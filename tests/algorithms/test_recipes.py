"""Overrides of recipes: of all variants, of one, and those that nobody would see."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from raysseg.algorithms.recipes import Recipe, choose, load_recipe
from raysseg.errors import InputError

VARIANTS: dict[str, Any] = {
    "fixed-0": {"policy": "fixed", "thresholds": 0.0, "window": "image"},
    "fixed-0.9": {"policy": "fixed", "thresholds": 0.9, "window": "image", "training.inferred_weight": 1.0},
    "searched": {"policy": "population", "population": {"size": 4, "generations": 1}},
    "none": {"policy": "none"},
}


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(
        yaml.safe_dump({"method": "eil", "data": {"source": "synthetic"}, "variants": VARIANTS}, sort_keys=False)
    )
    return path


def load(path: Path, *overrides: str) -> Recipe:
    return load_recipe(str(path), overrides)


def test_an_override_of_one_variant_leaves_the_others_as_they_are(recipe_file: Path) -> None:
    recipe = load(
        recipe_file,
        "variants.fixed-0.9.training.inferred_weight=0.3",
        "variants.fixed-0.9.thresholds=0.8",
        "variants.searched.population.size=6",
        "variants.none.training.stage_epochs=2",
    )
    found = {name: recipe.settings(name, 0) for name in recipe.variants}
    assert found["fixed-0.9"].training.inferred_weight == 0.3
    assert found["fixed-0.9"].eil.thresholds == 0.8  # type: ignore[attr-defined]
    assert found["fixed-0"].eil.thresholds == 0.0  # type: ignore[attr-defined]
    assert found["fixed-0"].training.inferred_weight is None
    population = found["searched"].eil.population  # type: ignore[attr-defined]
    assert (population.size, population.generations) == (6, 1)
    assert found["none"].training.stage_epochs == 2 != found["fixed-0"].training.stage_epochs
    again = recipe_file.parent / "again.yaml"
    again.write_text(recipe.dump())
    assert load(again).variants == recipe.variants


def test_a_section_given_to_a_variant_replaces_its_keys(recipe_file: Path) -> None:
    recipe = load(recipe_file, "variants.searched.population.size=6", "variants.searched.population={images: 8}")
    population = recipe.settings("searched", 0).eil.population  # type: ignore[attr-defined]
    assert (population.size, population.images) == (8, 8)
    recipe = load(recipe_file, "variants.none={policy: fixed}", "variants.new={policy: none}")
    assert recipe.settings("none", 0).eil.policy == "fixed"  # type: ignore[attr-defined]
    assert list(recipe.variants)[-1] == "new"


@pytest.mark.parametrize(
    ("key", "chosen", "seen"),
    [
        ("eil.window", (), True),
        ("eil.window", ("none", "fixed-0"), True),
        ("eil.window", ("fixed-0", "fixed-0.9"), False),
        ("eil.population.size", ("searched",), False),
        ("eil.population.size", ("fixed-0",), True),
        ("training.inferred_weight", ("fixed-0.9",), False),
    ],
)
def test_an_override_that_no_variant_would_see_is_refused(
    recipe_file: Path, key: str, chosen: tuple[str, ...], seen: bool
) -> None:
    recipe = load(recipe_file, "training.batch_size=2")
    recipe = dataclasses.replace(recipe, overridden=(*recipe.overridden, key))
    if seen:
        assert list(choose(recipe, variants=chosen).variants) == list(chosen or VARIANTS)
        return
    expected = f"Setting {key} has no effect, .*{', '.join(chosen)}.* set variants.{chosen[0]}.{key} instead"
    with pytest.raises(InputError, match=expected):
        choose(recipe, variants=chosen)


def test_an_override_is_known_to_the_choice(recipe_file: Path) -> None:
    recipe = load(recipe_file, "eil.window=15", "variants.none.window=5")
    assert recipe.overridden == ("eil.window",)
    assert recipe.settings("searched", 0).eil.window == 15  # type: ignore[attr-defined]
    with pytest.raises(InputError, match=r"Setting eil\.window has no effect"):
        choose(recipe, variants=["fixed-0.9", "none"])


def test_an_unknown_variant_is_refused(recipe_file: Path) -> None:
    with pytest.raises(InputError, match=r"small has no variant 'fixd-0'; did you mean 'fixed-0'\?"):
        load(recipe_file, "variants.fixd-0.window=9")
