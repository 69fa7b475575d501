"""The points of a sweep: every value of every swept key is checked through the recipe before any trial starts."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import itertools
import json
import math
import random
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
from pydantic import Field, model_validator

from raysseg.algorithms.recipes import Recipe, copy_values, set_value
from raysseg.algorithms.registry import get_method
from raysseg.algorithms.sweep_settings import Sweep
from raysseg.configuration import Settings, load_settings
from raysseg.core.settings import MethodSettings
from raysseg.errors import InputError, nearest_name

FIXED_KEYS = ("method", "recipe", "variant", "seed", "training.pretrained")
"""Keys that say which run it is; a sweep over them has no meaning."""

CHANGEABLE: dict[str, tuple[str, ...]] = {
    "eil": (
        "training.refine_learning_rate",
        "training.optimiser.clip_norm",
        "eil.gamma",
        "eil.exploration.noise_std",
        "eil.exploration.uniform_share",
        "eil.exploration.kappa",
        "eil.exploration.searcher_optimiser.learning_rate",
        "eil.exploration.searcher_optimiser.clip_norm",
        "eil.exploration.assessor_optimiser.learning_rate",
        "eil.exploration.assessor_optimiser.clip_norm",
    ),
    "ralis": (
        "training.refine_learning_rate",
        "training.optimiser.clip_norm",
    ),
}
"""Per method, the keys that take effect when a run goes on from a checkpoint with another value."""

STAGES_ALONE = ("stage_epochs", "refine_learning_rate", "self_training", "inferred_weight")
"""Keys of the section `training` that pre-training does not look at."""

MOST_COMBINATIONS = 64
"""Combinations of the other keys that are tried before a single value is called wrong."""


class Distribution(Settings):
    """Values drawn at random; exactly one of the four."""

    uniform: tuple[float, float] | None = Field(None, description="lowest and highest value")
    loguniform: tuple[float, float] | None = Field(None, description="lowest and highest value, both above 0")
    randint: tuple[int, int] | None = Field(None, description="lowest and highest value, both included")
    choice: tuple[Any, ...] | None = Field(None, min_length=1, description="values, each as likely")

    @model_validator(mode="after")
    def _one_that_is_possible(self) -> Distribution:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("expected is exactly one of uniform, loguniform, randint and choice")
        if given[0] != "choice":
            low, high = getattr(self, given[0])
            if low >= high:
                raise ValueError(f"the lowest value of {given[0]} must be below the highest, not {low} and {high}")
            if given[0] == "loguniform" and low <= 0:
                raise ValueError(f"the values of loguniform must be above 0, not {low}")
        return self


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """One swept key: its grid, or the distribution that its values are drawn from."""

    key: str
    grid: tuple[Any, ...] | None = None
    distribution: Distribution | None = None

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Lowest and highest value, where they come from a range."""
        found = self.distribution
        return (found.uniform or found.loguniform or found.randint) if found else None

    @property
    def choices(self) -> tuple[Any, ...] | None:
        """The values, where they are listed."""
        return self.grid or (self.distribution.choice if self.distribution else None)

    def draw(self, source: random.Random) -> Any:
        """Draws one value, with four digits."""
        if self.choices is not None:
            return source.choice(self.choices)
        assert self.distribution is not None
        assert self.bounds is not None
        low, high = self.bounds
        if self.distribution.randint is not None:
            return source.randint(int(low), int(high))
        if self.distribution.loguniform is not None:
            value = math.exp(source.uniform(math.log(low), math.log(high)))
        else:
            value = source.uniform(low, high)
        return min(max(float(f"{value:.4g}"), low), high)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One trial: a point of the sweep, or a baseline, with one seed.

    Args:
        label: the point in words; the name of its folder.
        seed: of the run.
        values: swept key to its value; empty for a baseline.
        recipe: its only variant is the point, with everything in its plain values.
        baseline: whether it is a line to compare with.
    """

    label: str
    seed: int
    values: Mapping[str, Any]
    recipe: Recipe
    baseline: bool = False

    @property
    def name(self) -> str:
        """Label and seed."""
        return f"{self.label}/seed-{self.seed}"

    def settings(self, pretrained: Path | None = None) -> MethodSettings:
        """Returns the settings of the run."""
        return self.recipe.settings(self.label, self.seed, pretrained=pretrained)


def known_keys(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields the dotted keys of all values of a settings class."""
    for name, field in model.model_fields.items():
        nested = _section(field.annotation)
        if nested is None:
            yield f"{prefix}{name}"
        else:
            yield from known_keys(nested, f"{prefix}{name}.")


def _section(annotation: Any) -> type[pydantic.BaseModel] | None:
    candidates = [annotation, *typing.get_args(annotation)]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, pydantic.BaseModel)), None)


def value_at(settings: MethodSettings, key: str) -> Any:
    """Returns the plain value under a dotted key, as the settings understood it."""
    value: Any = settings.model_dump(mode="json")
    for part in key.split("."):
        value = value[part]
    return value


def read_axes(sweep: Sweep) -> list[Axis]:
    """Reads the space of a sweep.

    Raises:
        InputError: a key that does not exist or cannot be swept, an empty grid, or a distribution that is none.
    """
    known = sorted(known_keys(sweep.recipe.method.settings))
    axes = []
    for key, raw in sweep.settings.space.items():
        if key in FIXED_KEYS:
            hint = "; list the seeds under 'seeds'" if key == "seed" else ""
            raise InputError(f"The key '{key}' says which run it is, so {sweep.where} cannot sweep it{hint}.")
        if key not in known:
            raise InputError(f"{_capital(sweep.where)} sweeps '{key}', which does not exist{_nearest_key(key, known)}")
        if sweep.settings.scheduler.name == "pbt" and key not in CHANGEABLE.get(_method(sweep), ()):
            allowed = ", ".join(CHANGEABLE.get(_method(sweep), ())) or "none for this method"
            raise InputError(
                f"The key '{key}' cannot change within a run, which PBT in {sweep.where} would do; it may use: {allowed}."
            )
        if isinstance(raw, list):
            if not raw:
                raise InputError(f"The grid of '{key}' in {sweep.where} is empty; expected is at least one value.")
            axes.append(Axis(key=key, grid=tuple(raw)))
        elif isinstance(raw, dict):
            distribution = load_settings(Distribution, raw, where=f"the space of '{key}' in {sweep.where}")
            axes.append(Axis(key=key, distribution=distribution))
        else:
            raise InputError(
                f"The space of '{key}' in {sweep.where} is {raw!r}; expected is a list of values, "
                "or one of uniform, loguniform, randint and choice."
            )
    return axes


def _method(sweep: Sweep) -> str:
    return str(sweep.recipe.values["method"])


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _nearest_key(key: str, known: Sequence[str]) -> str:
    """The nearest dotted key, also where only the section was forgotten; else the sections."""
    inside = [name for name in known if name.startswith(f"{key}.")]
    if inside:
        return f" as a value but is a section; sweep one of its keys, such as '{inside[0]}'"
    head, dot, _ = key.partition(".")
    sections = {name.partition(".")[0] for name in known if "." in name}
    if dot and head not in sections:
        return nearest_name(head, sections)
    last = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    close = difflib.get_close_matches(key, last or known, n=1, cutoff=0.0 if last else 0.6)
    return f"; did you mean '{close[0]}'?" if close else nearest_name(head, sections)


def fold(recipe: Recipe, variant: str, values: Mapping[str, Any], label: str) -> Recipe:
    """Returns a recipe whose only variant, `label`, is a variant of another one with swept values on top."""
    plain = recipe.of_variant(variant)
    for key, value in values.items():
        set_value(plain, key, copy_values(value))
    return dataclasses.replace(recipe, variants={label: {}}, values=plain)


def _check(sweep: Sweep, values: Mapping[str, Any], what: str) -> MethodSettings:
    """Raises `InputError` where the recipe refuses a point, before or after its pre-training."""
    recipe = fold(sweep.recipe, sweep.variant, values, sweep.variant)
    try:
        recipe.pretraining(recipe.seeds[0])
        return recipe.settings(sweep.variant, recipe.seeds[0])
    except InputError as error:
        raise InputError(f"{_capital(sweep.where)} tries {what}, which is refused: {error}") from None


def _check_values(sweep: Sweep, axis: Axis, axes: Sequence[Axis]) -> None:
    """Raises `InputError` for the first value of a key that is refused whatever the other keys are, or is there twice."""
    others = [axis_.choices or axis_.bounds or () for axis_ in axes if axis_ is not axis]
    keys = [axis_.key for axis_ in axes if axis_ is not axis]
    seen: list[Any] = []
    for value in axis.choices or axis.bounds or ():
        refusals = []
        for combination in itertools.islice(itertools.product(*others), MOST_COMBINATIONS):
            point = {**dict(zip(keys, combination, strict=True)), axis.key: value}
            try:
                plain = value_at(_check(sweep, point, f"the value {value!r} for '{axis.key}'"), axis.key)
            except InputError as error:
                refusals.append(error)
                continue
            if plain in seen:
                raise InputError(f"{_capital(sweep.where)} lists the value {value!r} for '{axis.key}' twice.")
            seen.append(plain)
            break
        else:
            raise refusals[0]


def plan_jobs(sweep: Sweep) -> tuple[list[Axis], list[Job]]:
    """Returns the swept keys and all trials of a sweep: baselines first, then every point, each with every seed.

    Raises:
        InputError: a value, a combination or a distribution that the recipe refuses, naming it; `samples` that are missing
            or have no effect; stages that a scheduler needs and the recipe does not have.
    """
    axes, settings = read_axes(sweep), sweep.settings
    population = settings.scheduler.name == "pbt"
    if settings.samples is None and (population or any(axis.distribution for axis in axes)):
        raise InputError(f"The key 'samples' is missing in {sweep.where}: it says how many values are drawn.")
    if settings.samples is not None and not population and all(axis.grid for axis in axes):
        raise InputError(f"The key 'samples' has no effect in {sweep.where}: its space holds only lists of values.")
    if population and settings.samples is not None and settings.samples < 2:
        raise InputError(f"The key 'samples' in {sweep.where} is {settings.samples}: PBT needs at least 2 members.")
    for axis in axes:
        _check_values(sweep, axis, axes)
    points = []
    for raw in _points(axes, settings.samples, settings.sample_seed, population=population):
        words = ", ".join(f"{key}={value!r}" for key, value in raw.items())
        understood = _check(sweep, raw, f"the point {words}")
        points.append({key: value_at(understood, key) for key in raw})
    labels = _labels(points)
    jobs: list[tuple[str, str, Mapping[str, Any], bool]] = [(name, name, {}, True) for name in settings.baseline]
    jobs += [(label, sweep.variant, values, False) for label, values in zip(labels, points, strict=True)]
    planned = [
        Job(label=label, seed=seed, values=values, recipe=fold(sweep.recipe, variant, values, label), baseline=line)
        for label, variant, values, line in jobs
        for seed in sweep.recipe.seeds
    ]
    _check_stages(sweep, planned)
    return axes, planned


def _points(axes: Sequence[Axis], samples: int | None, seed: int, *, population: bool) -> list[dict[str, Any]]:
    """Every combination of the grids, each with `samples` draws of the rest; a population draws everything."""
    source = random.Random(seed)
    grids = [axis.grid if axis.grid and not population else (None,) for axis in axes]
    return [
        {
            axis.key: value if axis.grid and not population else axis.draw(source)
            for axis, value in zip(axes, combination, strict=True)
        }
        for combination in itertools.product(*grids)
        for _ in range(samples or 1)
    ]


def _labels(points: Sequence[Mapping[str, Any]]) -> list[str]:
    """A short name per point that a folder can have; points that would share one are numbered."""
    keys = list(points[0])
    short = short_names(keys)
    names = ["_".join(f"{short[key]}={_word(point[key])}" for key in keys) for point in points]
    width = len(str(len(names)))
    return [
        name if len(name) <= 80 and names.count(name) == 1 else f"point-{index:0{width}d}_{name[:60]}"
        for index, name in enumerate(names)
    ]


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of every dotted key, or as many of its parts as tell it from the others."""
    names = {}
    for key in keys:
        parts = key.split(".")
        names[key] = next(
            ".".join(parts[-count:])
            for count in range(1, len(parts) + 1)
            if count == len(parts) or not any(o != key and o.split(".")[-count:] == parts[-count:] for o in keys)
        )
    return names


def _word(value: Any) -> str:
    text = (
        "-".join(map(_word, value))
        if isinstance(value, list)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
    return re.sub(r"[^A-Za-z0-9.+-]", "-", text)


def stages_of(settings: MethodSettings) -> int | None:
    """Returns the number of stages of a run, where the method's section says it."""
    section = getattr(settings, get_method(settings.method).section, None)
    stages = getattr(section, "stages", None)
    if isinstance(stages, int):
        return stages
    budgets = getattr(section, "budgets", None)
    return None if budgets is None else len(budgets)


def _check_stages(sweep: Sweep, jobs: Sequence[Job]) -> None:
    scheduler = sweep.settings.scheduler
    if scheduler.name == "none":
        return
    every = scheduler.asha.grace_stages if scheduler.name == "asha" else scheduler.pbt.interval_stages
    for job in jobs:
        settings = job.settings()
        if not settings.evaluation.every_stage:
            raise InputError(
                f"The scheduler '{scheduler.name}' of {sweep.where} compares stages, so evaluation.every_stage must be true."
            )
        stages = stages_of(settings)
        if stages is not None and every >= stages and not job.baseline:
            raise InputError(
                f"The scheduler '{scheduler.name}' of {sweep.where} decides after {every} stages, "
                f"but the trial {job.label} has {stages}: it would decide nothing."
            )


def pretraining_digest(job: Job) -> str:
    """Returns eight digits that two jobs share exactly where they can share one pre-trained segmenter.

    Of the method's section only what all variants of a recipe share counts; neither do the stages' own keys, the evaluation, or how
    the work is laid out.
    """
    method = job.recipe.method
    values = job.recipe.pretraining(job.seed).model_dump(mode="json")
    shared = {key: values[method.section][key] for key in method.shared}
    training = {k: v for k, v in values["training"].items() if k not in STAGES_ALONE}
    engine = {k: values["engine"][k] for k in ("precision", "gradient_accumulation", "num_learners", "torch_threads")}
    content = json.dumps([values["data"], values["segmenter"], training, engine, shared, job.seed], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:8]
