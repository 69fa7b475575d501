"""Every point of a sweep is checked before anything starts, and what is wrong is one sentence."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from algorithms.tiny_eil import VALUES
from algorithms.tiny_ralis import VALUES as RALIS_VALUES

from raysseg.algorithms.recipes import load_recipe
from raysseg.algorithms.sweep_points import Job, plan_jobs, pretraining_digest, short_names, value_at
from raysseg.algorithms.sweep_settings import Sweep, load_sweep
from raysseg.errors import InputError

VARIANTS = {"eil": {"window": 5}, "none": {"policy": "none"}}


@pytest.fixture
def sweep(tmp_path: Path) -> Callable[..., Sweep]:
    """Loads a sweep over gamma on the small recipe; keywords replace keys of the file, None removes one."""

    def load(*overrides: str, **changes: Any) -> Sweep:
        (tmp_path / "small.yaml").write_text(yaml.safe_dump({**VALUES, "seeds": [0], "variants": VARIANTS}))
        values = {"recipe": "small.yaml", "variant": "eil", "space": {"eil.gamma": [0.0, 0.9]}, **changes}
        path = tmp_path / "my_sweep.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in values.items() if value is not None}, sort_keys=False)
        )
        return load_sweep(path, overrides)

    return load


def labels(jobs: list[Job]) -> list[str]:
    """The points' names, each once, in their order."""
    return list(dict.fromkeys(job.label for job in jobs))


def test_a_grid_is_every_combination_with_every_seed_after_the_baselines(sweep: Callable[..., Sweep]) -> None:
    space = {"eil.gamma": [0, 0.9], "eil.exploration.noise_std": ["1e-2", 0.1]}
    _, jobs = plan_jobs(sweep(space=space, seeds=[3, 5], baseline=["none"]))
    assert labels(jobs) == [
        "none",
        "gamma=0_noise_std=0.01",
        "gamma=0_noise_std=0.1",
        "gamma=0.9_noise_std=0.01",
        "gamma=0.9_noise_std=0.1",
    ]
    assert [job.seed for job in jobs[:4]] == [3, 5, 3, 5]
    last = jobs[-1]
    # The variant's own options stay; numbers are what the settings understood.
    assert value_at(last.settings(), "eil.window") == 5
    assert value_at(last.settings(), "eil.gamma") == 0.9
    assert last.values == {"eil.gamma": 0.9, "eil.exploration.noise_std": 0.1}
    assert jobs[2].values["eil.exploration.noise_std"] == 0.01
    assert value_at(jobs[0].settings(), "eil.policy") == "none"
    assert jobs[0].baseline
    assert not last.baseline


def test_a_swept_value_wins_over_the_variant_and_set(sweep: Callable[..., Sweep]) -> None:
    _, jobs = plan_jobs(sweep("eil.delta=3", space={"eil.window": [7, "image"]}, set={"eil.stages": 1}))
    assert [value_at(job.settings(), "eil.window") for job in jobs] == [7, "image"]
    assert {value_at(job.settings(), "eil.stages") for job in jobs} == {1}
    assert {value_at(job.settings(), "eil.delta") for job in jobs} == {3.0}


def test_draws_stay_inside_and_are_the_same_again(sweep: Callable[..., Sweep]) -> None:
    space = {
        "eil.gamma": {"uniform": [0.2, 0.4]},
        "eil.exploration.kappa": {"loguniform": [0.001, 0.1]},
        "eil.exploration.batch_size": {"randint": [2, 3]},
        "eil.distance": {"choice": ["l1", "l2"]},
        "eil.stages": [1, 2],
    }
    _, jobs = plan_jobs(sweep(space=space, samples=20))
    assert len(jobs) == 40
    columns = {key: [job.values[key] for job in jobs] for key in space}
    assert all(0.2 <= value <= 0.4 for value in columns["eil.gamma"])
    assert all(0.001 <= value <= 0.1 for value in columns["eil.exploration.kappa"])
    assert sum(value < 0.01 for value in columns["eil.exploration.kappa"]) > 10
    assert set(columns["eil.exploration.batch_size"]) == {2, 3}
    assert set(columns["eil.distance"]) == {"l1", "l2"}
    assert columns["eil.stages"].count(1) == 20
    assert [job.values for job in plan_jobs(sweep(space=space, samples=20))[1]] == [job.values for job in jobs]
    assert [job.values for job in plan_jobs(sweep(space=space, samples=20, sample_seed=1))[1]] != columns


def test_only_keys_that_reach_pretraining_split_it(sweep: Callable[..., Sweep]) -> None:
    def digests(key: str, values: list[Any]) -> int:
        return len({pretraining_digest(job) for job in plan_jobs(sweep(space={key: values}))[1]})

    assert digests("eil.gamma", [0, 0.5, 0.9]) == 1
    assert digests("training.refine_learning_rate", [1e-3, 1e-4]) == 1
    assert digests("training.self_training.weight", [0.0, 0.5, 1.0]) == 1
    assert digests("evaluation.flip", [True, False]) == 1
    assert digests("training.batch_size", [2, 4]) == 2
    assert digests("segmenter.decoder_channels", [16, 8]) == 2
    assert digests("data.synthetic.noise", [2.0, 4.0]) == 2
    seeds = plan_jobs(sweep(seeds=[0, 1]))[1]
    assert len({pretraining_digest(job) for job in seeds}) == 2


def test_what_a_methods_pretraining_depends_on_splits_it_and_is_no_variants_own(tmp_path: Path) -> None:
    recipe = {**RALIS_VALUES, "seeds": [0], "variants": {"uniform": {"policy": "uniform"}}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))

    def digests(key: str, values: list[Any]) -> int:
        path = tmp_path / "my_sweep.yaml"
        path.write_text(yaml.safe_dump({"recipe": "small.yaml", "variant": "uniform", "space": {key: values}}))
        return len({pretraining_digest(job) for job in plan_jobs(load_sweep(path, ()))[1]})

    assert digests("ralis.start_share", [0.5, 1.0]) == 2
    assert digests("ralis.sets.state", [2, 3]) == 2
    assert digests("ralis.pool_size", [2, 3]) == 1
    for key in ("start_share", "ralis.sets.start"):
        variants = {"uniform": {"policy": "uniform"}, "other": {"policy": "uniform", key: 1}}
        (tmp_path / "small.yaml").write_text(yaml.safe_dump({**recipe, "variants": variants}))
        with pytest.raises(InputError, match=rf"variant other of small sets {key}, .* set ralis\."):
            load_recipe(str(tmp_path / "small.yaml"))


def test_short_names_tell_keys_apart() -> None:
    keys = ["a.searcher.learning_rate", "a.assessor.learning_rate", "b.gamma"]
    assert list(short_names(keys).values()) == ["searcher.learning_rate", "assessor.learning_rate", "gamma"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key of the file": ({"sceduler": "asha"}, r"Unknown key 'sceduler' in the sweep my_sweep; .*'scheduler'\?"),
    "unknown recipe": ({"recipe": "eil-synthetik"}, r"Unknown recipe 'eil-synthetik'; did you mean 'eil-synthetic'\?"),
    "unknown variant": ({"variant": "eill"}, r"The recipe small has no variant 'eill'; did you mean 'eil'\?"),
    "no variant": ({"variant": None}, r"The sweep my_sweep names no variant, but the recipe small has .*: eil, none\."),
    "unknown baseline": ({"baseline": ["nonne"]}, r"The recipe small has no variant 'nonne'; did you mean 'none'\?"),
    "unknown swept key": (
        {"space": {"eil.gama": [0.9]}},
        r"The sweep my_sweep sweeps 'eil.gama', which does not exist; did you mean 'eil.gamma'\?",
    ),
    "section forgotten": ({"space": {"kappa": [0.1]}}, r".* sweeps 'kappa', .* mean 'eil.exploration.kappa'\?"),
    "unknown section": (
        {"space": {"enginee.x": [1]}},
        r".* 'enginee.x', which does not exist; did you mean 'engine'\?",
    ),
    "a section": ({"space": {"eil.operators": [1]}}, r".* is a section; sweep one of its keys, such as .*"),
    "the seed": (
        {"space": {"seed": [0, 1]}},
        r"The key 'seed' says which run it is, .*; list the seeds under 'seeds'\.",
    ),
    "empty grid": ({"space": {"eil.gamma": []}}, r"The grid of 'eil.gamma' in the sweep my_sweep is empty; .*"),
    "one bad value": (
        {"space": {"eil.gamma": [0.0, 1.5, 0.9]}},
        r"The sweep my_sweep tries the value 1.5 for 'eil.gamma', which is refused: .*less than or equal to 1\.",
    ),
    "bad end of a range": (
        {"space": {"eil.gamma": {"uniform": [0.5, 1.5]}}, "samples": 3},
        r".* tries the value 1.5 for 'eil.gamma', which is refused: .*",
    ),
    "bad combination": (
        {"space": {"eil.window": [[5, 7], 9], "eil.stages": [2, 3]}},
        r".* tries the point eil.window=\[5, 7\], eil.stages=3, .*window lists 2 sides, but there are 3 stages\.?",
    ),
    "twice": ({"space": {"eil.gamma": [0.5, "5e-1"]}}, r".* lists the value '5e-1' for 'eil.gamma' twice\."),
    "no distribution": ({"space": {"eil.gamma": {"unifrom": [0, 1]}}}, r"Unknown key 'unifrom' in .*'uniform'\?"),
    "two distributions": (
        {"space": {"eil.gamma": {"uniform": [0, 1], "choice": [0]}}, "samples": 1},
        r".*expected is exactly one of uniform, loguniform, randint and choice",
    ),
    "reversed range": ({"space": {"eil.gamma": {"uniform": [1, 0]}}, "samples": 1}, r".* must be below the highest.*"),
    "no space": (
        {"space": {"eil.gamma": 0.5}},
        r"The space of 'eil.gamma' .* is 0.5; expected is a list of values, .*",
    ),
    "samples missing": ({"space": {"eil.gamma": {"uniform": [0, 1]}}}, r"The key 'samples' is missing in .*"),
    "samples without effect": ({"samples": 3}, r"The key 'samples' has no effect in the sweep my_sweep: .*"),
    "seed twice": ({"seeds": [1, 1]}, r"In the sweep my_sweep: seeds must be different numbers from 0, .*"),
    "set and swept": (
        {"set": {"eil.gamma": 0.1}},
        r"The sweep my_sweep sweeps 'eil.gamma', so 'eil.gamma' cannot be .*",
    ),
    "seeds set": ({"set": {"seeds": [1]}}, r"The sweep my_sweep cannot set 'seeds': .*"),
    "paper of another key": (
        {"paper": {"eil.delta": {"source": "x", "series": {"voc": {10: 77.9}}}}},
        r"In the sweep my_sweep: paper reports 'eil.delta', which is not swept; swept are eil.gamma",
    ),
    "paper in fractions of hundreds": (
        {"paper": {"eil.gamma": {"source": "x", "series": {"voc": {0.9: 779}}}}},
        r".*the mIoU of 'voc' at 0.9 must lie in 0 to 100 per cent, not 779\.",
    ),
    "PBT over what cannot change": (
        {"space": {"eil.window": [5, 7]}, "scheduler": "pbt", "samples": 4},
        r"The key 'eil.window' cannot change within a run, which PBT in the sweep my_sweep would do; .*eil.gamma.*",
    ),
    "PBT with turns of its own": (
        {"scheduler": "pbt", "samples": 4, "concurrent": 2},
        r"In the sweep my_sweep: concurrent has no effect with PBT, .*; set resources instead",
    ),
    "PBT of one": ({"scheduler": "pbt", "samples": 1}, r".*PBT needs at least 2 members\."),
    "PBT without samples": ({"scheduler": "pbt"}, r"The key 'samples' is missing in .*"),
    "PBT after the end": (
        {"scheduler": {"name": "pbt", "pbt": {"interval_stages": 2}}, "samples": 2},
        r".* decides after 2 stages, but the trial .*gamma=.* has 2: it would decide nothing\.",
    ),
    "ASHA with seeds": (
        {"scheduler": "asha", "seeds": [0, 1]},
        r".* has 2 seeds with the scheduler 'asha', .* one seed\.",
    ),
    "ASHA without stages": (
        {"scheduler": "asha", "set": {"evaluation.every_stage": False}},
        r"The scheduler 'asha' of the sweep my_sweep compares stages, so evaluation.every_stage must be true\.",
    ),
    "options of another scheduler": (
        {"scheduler": {"name": "asha", "pbt": {"interval_stages": 2}}},
        r".*the settings of 'pbt' have no effect with the scheduler 'asha'.*",
    ),
    "negative GPUs": ({"resources": {"gpu": -1.0}}, r"The key 'resources.gpu.*expected is 'auto' or a number from 0\."),
}


@pytest.mark.parametrize("case", list(REFUSED))
def test_what_does_not_fit_is_one_sentence(case: str, sweep: Callable[..., Sweep]) -> None:
    changes, expected = REFUSED[case]
    with pytest.raises(InputError) as error:
        plan_jobs(sweep(**changes))
    assert re.fullmatch(expected, str(error.value)), str(error.value)


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"The sweep file .*absent\.yaml does not exist\."):
        load_sweep(tmp_path / "absent.yaml")
    for text, expected in (("space: [", "is not valid YAML"), ("- 1", "holds no mapping of keys to values")):
        (tmp_path / "bad.yaml").write_text(text)
        with pytest.raises(InputError, match=f"bad.yaml {expected}"):
            load_sweep(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parents[2] / "tune_configs").glob("*.yaml")), ids=lambda path: str(path.stem)
)
def test_the_sweeps_of_the_repository_are_possible(path: Path) -> None:
    _, jobs = plan_jobs(load_sweep(path))
    assert len(jobs) >= 3
