"""Recipes: complete runs as YAML. One pre-trained segmenter per seed, then every variant from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from raysseg.algorithms.registry import Method, get_method
from raysseg.configuration import load_settings
from raysseg.core.metrics_writer import write_atomically
from raysseg.core.modules import SEGMENTER
from raysseg.core.progress import ProgressListener
from raysseg.core.run import DATASET_FILE, package_versions, read_settings, run_variant
from raysseg.core.settings import MethodSettings
from raysseg.data import DatasetInfo, Store, open_dataset
from raysseg.errors import InputError, nearest_name
from raysseg.segmenters import Segmenter, build_segmenter

OWN_KEYS = ("method", "description", "seeds", "variants")


def shipped_recipes() -> dict[str, str]:
    """Returns the names of the recipes that come with the package, with their descriptions."""
    folder = resources.files("raysseg") / "recipes"
    found = {}
    for path in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if path.name.endswith(".yaml"):
            found[path.name.removesuffix(".yaml")] = str(
                yaml.safe_load(path.read_text()).get("description", "")
            ).strip()
    return found


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A resolved recipe.

    Args:
        name: of the recipe or its file.
        method: what is trained.
        seeds: one run of every variant each.
        variants: name to what differs: keys of the method's section, or dotted keys from another section's name on.
        values: plain values of all sections.
        overridden: dotted keys of `values` that were given beside the recipe's file.
    """

    name: str
    method: Method
    seeds: tuple[int, ...]
    variants: Mapping[str, Mapping[str, Any]]
    values: Mapping[str, Any]
    overridden: tuple[str, ...] = ()

    def of_variant(self, variant: str) -> dict[str, Any]:
        """Returns plain values of all sections as a variant has them."""
        values: dict[str, Any] = copy_values(self.values)
        for key, value in self.variants[variant].items():
            set_value(values, self.full_key(key), copy_values(value))
        return values

    def full_key(self, key: str) -> str:
        """Returns a variant's key with the section that it is in."""
        inside = key.partition(".")[0] not in self.method.settings.model_fields
        return f"{self.method.section}.{key}" if inside else key

    def settings(self, variant: str, seed: int, *, pretrained: Path | None = None) -> MethodSettings:
        """Returns the settings of one variant and seed. Raises `InputError` for whatever does not fit."""
        values = self.of_variant(variant)
        values |= {"recipe": self.name, "variant": variant, "seed": seed}
        if pretrained is not None:
            set_value(values, "training.pretrained", str(pretrained))
        return load_settings(self.method.settings, values, where=f"the recipe {self.name}, variant {variant}")

    def pretraining(self, seed: int) -> MethodSettings:
        """Returns the settings of the pre-training that all variants of a seed share."""
        values: dict[str, Any] = copy_values(self.values)
        for key, value in self.method.pretraining.items():
            set_value(values, f"{self.method.section}.{key}", value)
        values |= {"recipe": self.name, "variant": "pretrain", "seed": seed}
        return load_settings(self.method.settings, values, where=f"the recipe {self.name}")

    def dump(self) -> str:
        """Returns the recipe as YAML, ready to be trained again."""
        plain = {"seeds": list(self.seeds), **copy_values(self.values), "variants": copy_values(self.variants)}
        return yaml.safe_dump(plain, sort_keys=False)


def copy_values(values: Any) -> Any:
    """Returns a deep copy of plain nested values, with lists in place of tuples."""
    if isinstance(values, Mapping):
        return {key: copy_values(value) for key, value in values.items()}
    return [copy_values(value) for value in values] if isinstance(values, (list, tuple)) else values


def set_value(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Sets one nested value by its dotted key; a section that is missing is made.

    Raises:
        InputError: the key goes through a value that is no section.
    """
    *path, last = dotted.split(".")
    for part in path:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            raise InputError(f"The key '{dotted}' goes through '{part}', which is a value and not a section.")
        values = inner
    values[last] = value


def set_options(values: dict[str, Any], section: str, options: Mapping[str, Any]) -> None:
    """Sets options of a section; those that are given as a section of their own leave the rest of it as it is."""
    for key, value in options.items():
        if isinstance(value, Mapping):
            set_options(values, f"{section}.{key}", value)
        else:
            set_value(values, f"{section}.{key}", value)


def load_recipe(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe that is shipped (by name) or a YAML file, and applies `key=value` overrides: of the whole recipe, or
    of one variant with the key `variants.NAME.KEY`.

    Raises:
        InputError: an unknown recipe, method or variant, a file that is no YAML mapping, an override without '=', or any
            key or value that the settings refuse; every variant is checked.
    """
    path = Path(name)
    if name in shipped_recipes():
        text, label = (resources.files("raysseg") / "recipes" / f"{name}.yaml").read_text(), name
    elif path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise InputError(f"The recipe file {path} does not exist.")
        text, label = path.read_text(), path.stem
    else:
        raise InputError(f"Unknown recipe '{name}'{nearest_name(name, shipped_recipes())}")
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"The recipe file {path} is not valid YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(values, dict):
        raise InputError(f"The recipe file {path} holds no mapping of keys to values.")
    overridden = []
    for override in overrides:
        key, equals, raw = override.partition("=")
        if not equals or not key:
            raise InputError(f"--set takes key=value, not '{override}'.")
        try:
            value = yaml.safe_load(raw)
        except yaml.YAMLError:
            raise InputError(f"--set {override}: the value is not YAML.") from None
        if key.startswith("variants."):
            _set_in_variant(values, label, key.removeprefix("variants."), value)
        else:
            set_value(values, key, value)
            overridden.append(key)
    return dataclasses.replace(_resolve(label, values), overridden=tuple(overridden))


def _set_in_variant(values: dict[str, Any], recipe: str, dotted: str, value: Any) -> None:
    """Sets one option of a variant, whose name may have dots of its own."""
    variants = values.setdefault("variants", {})
    if not isinstance(variants, dict):
        raise InputError(f"The key 'variants' in {recipe} must map names to the options that differ.")
    names = [str(name) for name in variants]
    if dotted in names or "." not in dotted:
        variants[dotted] = value
        return
    # Of fixed-0 and fixed-0.9 the longer one is meant.
    name = max((name for name in names if dotted.startswith(f"{name}.")), key=len, default=None)
    if name is None:
        wanted = dotted.partition(".")[0]
        raise InputError(f"--set variants.{dotted}: {recipe} has no variant '{wanted}'{nearest_name(wanted, names)}")
    options = dict(variants[name] or {})
    key = dotted.removeprefix(f"{name}.")
    for inner in [own for own in options if own.startswith(f"{key}.")]:
        del options[inner]
    variants[name] = {**options, key: value}


def _resolve(name: str, values: dict[str, Any]) -> Recipe:
    method = get_method(str(values.get("method", "")))
    label = str(values.get("recipe", name))
    seeds, variants = values.get("seeds", [0]), values.get("variants") or {"default": {}}
    seeds = [seeds] if isinstance(seeds, int) else seeds
    if not isinstance(seeds, list) or not seeds or not all(isinstance(seed, int) and seed >= 0 for seed in seeds):
        raise InputError(f"The key 'seeds' in {name} has the value {seeds!r}: expected one or more numbers from 0.")
    if not isinstance(variants, dict) or not all(isinstance(value, (dict, type(None))) for value in variants.values()):
        raise InputError(f"The key 'variants' in {name} must map names to the options that differ.")
    recipe = Recipe(
        name=label,
        method=method,
        seeds=tuple(seeds),
        variants={str(key): value or {} for key, value in variants.items()},
        values={"method": values["method"], **{k: v for k, v in values.items() if k not in OWN_KEYS}},
    )
    for variant in recipe.variants:
        _check_shared(recipe, variant)
        recipe.settings(variant, recipe.seeds[0])
    recipe.pretraining(recipe.seeds[0])
    return recipe


def _check_shared(recipe: Recipe, variant: str) -> None:
    """Raises `InputError` where a variant changes what the pre-training that it shares with the others depends on."""
    section = recipe.method.section
    for key in recipe.variants[variant]:
        own = key.removeprefix(f"{section}.")
        if own.partition(".")[0] in recipe.method.shared:
            raise InputError(
                f"The variant {variant} of {recipe.name} sets {key}, which the pre-training that all variants of a seed share "
                f"depends on; set {section}.{own} for the whole recipe."
            )


def choose(recipe: Recipe, *, variants: Sequence[str] = (), seeds: Sequence[int] = ()) -> Recipe:
    """Returns the recipe with only some of its variants, or with other seeds.

    Raises:
        InputError: an unknown variant, or an override that none of the variants would see.
    """
    for name in variants:
        if name not in recipe.variants:
            raise InputError(f"The recipe {recipe.name} has no variant '{name}'{nearest_name(name, recipe.variants)}")
    chosen = {name: recipe.variants[name] for name in variants} if variants else recipe.variants
    for key in recipe.overridden:
        own = [[recipe.full_key(other) for other in options] for options in chosen.values()]
        if all(any(f"{key}.".startswith(f"{other}.") for other in keys) for keys in own):
            first = next(iter(chosen))
            raise InputError(
                f"Setting {key} has no effect, because every variant that is trained ({', '.join(chosen)}) has a value of its own: "
                f"set variants.{first}.{key} instead."
            )
    return dataclasses.replace(recipe, variants=chosen, seeds=tuple(seeds) or recipe.seeds)


def train_recipe(
    recipe: Recipe,
    run_dir: Path,
    *,
    resume: bool = False,
    listener_for: Any = None,
) -> list[dict[str, Any]]:
    """Pre-trains once per seed and trains every variant from it; returns the summaries in order.

    Args:
        recipe: what to train.
        run_dir: where everything is written; see the README for its layout.
        resume: continue what was interrupted; what is finished is kept.
        listener_for: makes a `ProgressListener` context manager from a title, or None to show nothing.

    Raises:
        InputError: before any actor starts, for data, weights, GPUs or a run directory that do not fit.
    """
    run_dir = run_dir.absolute()
    config_path = run_dir / "config.yaml"
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"The run directory {run_dir} is a file; choose another --run-dir.")
    if run_dir.is_dir() and any(run_dir.iterdir()) and not resume:
        raise InputError(
            f"The run directory {run_dir} is not empty; add --resume to continue it, or choose another --run-dir."
        )
    if config_path.exists() and config_path.read_text() != recipe.dump():
        raise InputError(
            f"The run directory {run_dir} was made with another configuration; "
            "resume it with the same recipe and --set options."
        )
    data = recipe.pretraining(recipe.seeds[0]).data
    store = open_dataset(data, run_dir / "data")
    for split in (data.train_split, data.val_split):
        store.keys(split)
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(config_path, recipe.dump())
    write_atomically(run_dir / "versions.json", json.dumps(package_versions(), indent=1))
    summaries = []
    for seed in recipe.seeds:
        shared = _pretrain(recipe, run_dir, store, seed, resume=resume, listener_for=listener_for)
        for variant in recipe.variants:
            settings = recipe.settings(variant, seed, pretrained=shared)
            folder = run_dir / "variants" / variant / f"seed-{seed}"
            summaries.append(
                _train(
                    recipe.method,
                    settings,
                    folder,
                    store,
                    f"{variant} · seed {seed}",
                    resume=resume,
                    listener_for=listener_for,
                )
            )
    return summaries


def _pretrain(
    recipe: Recipe, run_dir: Path, store: Store, seed: int, *, resume: bool, listener_for: Any
) -> Path | None:
    """Returns the folder of the pre-trained segmenter of a seed, trained now unless it is given; `{seed}` in a given
    path is filled in.
    """
    settings = recipe.pretraining(seed)
    given = settings.training.pretrained
    if given is not None:
        return Path(given.replace("{seed}", str(seed)))
    if settings.training.pretrain_epochs == 0:
        return None
    folder = run_dir / "pretrain" / f"seed-{seed}"
    _train(
        recipe.method, settings, folder, store, f"pre-training · seed {seed}", resume=resume, listener_for=listener_for
    )
    return folder / SEGMENTER


def _train(
    method: Method,
    settings: MethodSettings,
    folder: Path,
    store: Store,
    title: str,
    *,
    resume: bool,
    listener_for: Any,
) -> dict[str, Any]:
    config = method.config().apply(settings, run_dir=str(folder), store_uri=store.uri)
    if listener_for is None:
        return run_variant(config, folder, resume=resume)
    listener: ProgressListener
    with listener_for(title) as listener:
        return run_variant(config, folder, resume=resume, listener=listener)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class FinishedVariant:
    """What a finished variant left: its settings, its classes and its trained segmenter on the CPU."""

    folder: Path
    settings: MethodSettings
    info: DatasetInfo
    segmenter: Segmenter
    recorded_store: str

    def predictor(self) -> nn.Module:
        """Returns what predicts, on the CPU: the segmenter, or what the method makes of it.

        Raises:
            InputError: a file of the method is missing or damaged, or the variant cannot predict.
        """
        make = get_method(self.settings.method).predictor
        return self.segmenter if make is None else make(self.settings, self.folder, self.segmenter)

    def store(self) -> Store:
        """Opens the data that the variant was trained on; raises `InputError` where it has gone."""
        try:
            return Store.open(self.recorded_store)
        except InputError:
            # The run directory may have been moved, or its data removed to save space.
            return open_dataset(self.settings.data, self.folder.parents[2] / "data")


def load_variant(folder: Path) -> FinishedVariant:
    """Reads a finished variant; its training data is not needed.

    Raises:
        InputError: the folder is not a finished variant's.
    """
    folder = folder.resolve()
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(f"{folder} is not the folder of a trained variant: it has no config.yaml.")
    method = get_method(str((yaml.safe_load(path.read_text()) or {}).get("method", "")))
    settings = read_settings(folder, method.settings)
    weights, dataset = folder / SEGMENTER / "online.safetensors", folder / DATASET_FILE
    if not weights.is_file() or not dataset.is_file():
        raise InputError(f"The variant in {folder} is not finished: it has no trained segmenter yet.")
    record = json.loads(dataset.read_text())
    info = DatasetInfo(
        **{
            **record["info"],
            "class_names": tuple(record["info"]["class_names"]),
            "palette": tuple(tuple(colour) for colour in record["info"]["palette"]),
        }
    )
    segmenter = build_segmenter(settings.segmenter.model_copy(update={"weights": str(weights)}), info.num_classes)
    return FinishedVariant(
        folder=folder, settings=settings, info=info, segmenter=segmenter.eval(), recorded_store=record["store"]
    )
