"""A sweep file: which keys are varied, how trials are chosen, what each may use, and what the paper reports."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from raysseg.algorithms.recipes import OWN_KEYS, Recipe, choose, load_recipe
from raysseg.configuration import Settings, load_settings
from raysseg.errors import InputError

Metric = Literal["miou", "pixel_accuracy", "mean_foreground_dice"]


class AshaSettings(Settings):
    """Asynchronous successive halving: at rungs of stages only the better part of the trials goes on."""

    grace_stages: int = Field(1, ge=1, description="stages that every trial gets; the first rung")
    reduction_factor: float = Field(2.0, gt=1, description="one trial of so many goes on from a rung; rungs lie as far")


class PbtSettings(Settings):
    """Population-based training: the worst members take over the best ones' checkpoints, with other values."""

    interval_stages: int = Field(1, ge=1, description="stages between two exchanges")
    quantile_fraction: float = Field(0.25, gt=0, le=0.5, description="share of the population that is replaced")
    resample_probability: float = Field(0.25, ge=0, le=1, description="of a new draw in place of a step from the donor")
    factors: tuple[float, float] = Field((1.2, 0.8), description="steps of a continuous value; kept inside its range")


class SchedulerSettings(Settings):
    """Who decides which trials go on."""

    name: Literal["none", "asha", "pbt"] = Field("none", description="none: every trial runs to its end")
    asha: AshaSettings = AshaSettings()
    pbt: PbtSettings = PbtSettings()

    @model_validator(mode="after")
    def _options_have_effect(self) -> SchedulerSettings:
        for key in ("asha", "pbt"):
            if key != self.name and getattr(self, key) != type(getattr(self, key))():
                raise ValueError(f"the settings of '{key}' have no effect with the scheduler '{self.name}'")
        return self


class ResourceSettings(Settings):
    """What the main process of one trial reserves; remote actors and learners come on top, as the engine says."""

    cpu: float = Field(1.0, gt=0, description="CPUs of one trial; torch gets as many threads, at least one")
    gpu: float | Literal["auto"] = Field(
        "auto", description="GPUs of one trial; a fraction shares one; auto: GPUs divided by 'concurrent', at most 1"
    )

    @field_validator("gpu")
    @classmethod
    def _not_negative(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value < 0:
            raise ValueError("expected is 'auto' or a number from 0")
        return value


class PaperSettings(Settings):
    """What the paper reports for one swept key."""

    source: str = Field(description="where it stands in the paper, and how sure the reading is")
    series: dict[str, dict[Any, float]] = Field(min_length=1, description="dataset to value to mIoU in per cent")

    @model_validator(mode="after")
    def _per_cent(self) -> PaperSettings:
        for name, points in self.series.items():
            for value, miou in points.items():
                if not 0 <= miou <= 100:
                    raise ValueError(f"the mIoU of '{name}' at {value} must lie in 0 to 100 per cent, not {miou:g}")
        return self


class SweepSettings(Settings):
    """Everything that a sweep file may say."""

    description: str = ""
    recipe: str = Field(description="a shipped recipe's name, or a recipe file")
    variant: str | None = Field(None, description="variant of the recipe that is varied; needed where it has several")
    seeds: tuple[int, ...] | None = Field(None, min_length=1, description="none: the recipe's seeds")
    set: dict[str, Any] = Field({}, description="dotted keys of the recipe that are replaced, as with --set")
    space: dict[str, Any] = Field(
        min_length=1, description="dotted key to a list of values, or to {uniform|loguniform|randint|choice: …}"
    )
    samples: int | None = Field(None, ge=1, description="draws from the distributions; the population of PBT")
    sample_seed: int = Field(0, ge=0, description="of these draws, and of PBT's choices")
    metric: Metric = Field("miou", description="after the last stage; more is better")
    scheduler: SchedulerSettings = SchedulerSettings()
    resources: ResourceSettings = ResourceSettings()
    concurrent: int | None = Field(None, ge=1, description="trials at a time; none: as many as the resources allow")
    baseline: tuple[str, ...] = Field((), description="other variants of the recipe, trained once per seed, as lines")
    paper: dict[str, PaperSettings] = Field({}, description="swept key to what the paper reports for it")

    @field_validator("scheduler", mode="before")
    @classmethod
    def _name_alone(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _possible(self) -> SweepSettings:
        if any(seed < 0 for seed in self.seeds or ()) or len(set(self.seeds or ())) < len(self.seeds or ()):
            raise ValueError(f"seeds must be different numbers from 0, not {list(self.seeds or ())}")
        if self.scheduler.name == "pbt" and self.concurrent is not None:
            raise ValueError(
                "concurrent has no effect with PBT, whose members take turns on what there is; set resources instead"
            )
        for key in self.paper:
            if key not in self.space:
                raise ValueError(f"paper reports '{key}', which is not swept; swept are {', '.join(self.space)}")
        return self


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep file with its recipe.

    Args:
        name: of the file.
        settings: what the file says.
        recipe: with `set` and the command's own overrides applied; its seeds are the sweep's.
        variant: what is varied.
    """

    name: str
    settings: SweepSettings
    recipe: Recipe
    variant: str

    @property
    def where(self) -> str:
        """How messages call it."""
        return f"the sweep {self.name}"

    def dump(self) -> str:
        """Returns the resolved sweep as YAML: what must be the same for a sweep to go on."""
        own = self.settings.model_dump(mode="json", exclude={"set", "seeds", "concurrent", "resources"})
        plain = {**own, "variant": self.variant, "recipe": yaml.safe_load(self.recipe.dump())}
        return yaml.safe_dump(plain, sort_keys=False)


def load_sweep(path: Path, overrides: Sequence[str] = (), *, seeds: Sequence[int] = ()) -> Sweep:
    """Reads a sweep file and its recipe.

    Args:
        path: the YAML file.
        overrides: further `key=value` for the recipe, after the file's own `set`.
        seeds: in place of the file's.

    Raises:
        InputError: a file that is missing or no YAML mapping, an unknown key, recipe or variant, a value that is set and
            swept, or anything the recipe refuses.
    """
    name = path.stem
    values = _read(path)
    settings = load_settings(SweepSettings, values, where=f"the sweep {name}")
    assignments = [f"{key}={_inline(value)}" for key, value in settings.set.items()] + list(overrides)
    for assignment in assignments:
        key = assignment.partition("=")[0]
        if key in OWN_KEYS:
            raise InputError(f"The sweep {name} cannot set '{key}': only the recipe's settings can be set.")
    recipe = load_recipe(_recipe_name(settings.recipe, path), assignments)
    recipe = choose(recipe, seeds=seeds or settings.seeds or ())
    variant = settings.variant or next(iter(recipe.variants))
    choose(recipe, variants=[variant, *settings.baseline])
    if settings.variant is None and len(recipe.variants) > 1:
        raise InputError(
            f"The sweep {name} names no variant, but the recipe {recipe.name} has several: {', '.join(recipe.variants)}."
        )
    for assignment in assignments:
        key = assignment.partition("=")[0]
        own = recipe.full_key(key.removeprefix(f"variants.{variant}."))
        for swept in settings.space:
            if f"{own}.".startswith(f"{swept}.") or f"{swept}.".startswith(f"{own}."):
                raise InputError(f"The sweep {name} sweeps '{swept}', so '{key}' cannot be set as well.")
    if settings.scheduler.name != "none" and len(recipe.seeds) > 1:
        raise InputError(
            f"The sweep {name} has {len(recipe.seeds)} seeds with the scheduler '{settings.scheduler.name}', which "
            "compares single trials: give it one seed."
        )
    return Sweep(name=name, settings=settings, recipe=recipe, variant=variant)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"The sweep file {path} does not exist.")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"The sweep file {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise InputError(f"The sweep file {path} holds no mapping of keys to values.")
    return values


def _recipe_name(recipe: str, path: Path) -> str:
    """A recipe file is looked for from the working directory, then beside the sweep file."""
    beside = path.parent / recipe
    return (
        str(beside) if recipe.endswith((".yaml", ".yml")) and not Path(recipe).exists() and beside.exists() else recipe
    )


def _inline(value: Any) -> str:
    """A value as YAML on one line."""
    return yaml.safe_dump([value], default_flow_style=True, width=float("inf")).strip()[1:-1]
