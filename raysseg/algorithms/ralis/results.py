"""What a finished run of RALIS leaves beside its segmenter: weights, sets, labelled regions and a picture of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import save_file

from raysseg.algorithms.ralis.module import QUERY, START
from raysseg.algorithms.ralis.variant_sets import SETS_FILE
from raysseg.core.metrics_writer import write_atomically
from raysseg.core.modules import SEGMENTER
from raysseg.core.pictures import draw_label_maps
from raysseg.functional.constants import UNLABELLED
from raysseg.segmenters import Segmenter

if TYPE_CHECKING:
    from raysseg.algorithms.ralis.algorithm import RALIS

PICTURED_IMAGES = 3
QUERY_FILE = "query.safetensors"
"""The trained query network of a run, in its folder `query`."""
REGIONS_FILE = "regions.jsonl"
"""The labelled regions of a run: one JSON object each with `number`, `step`, `key` and `region`, in their order."""


def write_results(algorithm: RALIS, folder: Path) -> None:
    """Writes beside the segmenter what played episodes start with and the sets, and where there are any the query network and
    the labelled regions.

    Args:
        algorithm: of a finished run.
        folder: of the run, where the segmenter has been written.

    Source: design.
    """
    _module_of(algorithm, START).export(folder / SEGMENTER)
    algorithm.sets.save(folder / SEGMENTER / SETS_FILE, algorithm.train_keys)
    if algorithm.settings.ralis.learns:
        (folder / QUERY).mkdir(exist_ok=True)
        save_file(_module_of(algorithm, QUERY).query.state_dict(), folder / QUERY / QUERY_FILE)
    if len(algorithm.labelled):
        write_atomically(folder / REGIONS_FILE, _region_lines(algorithm))


def _module_of(algorithm: RALIS, name: str) -> Any:
    """Returns a copy of one of the learner's modules on the CPU, as an actor has it."""
    built = algorithm.config.get_multi_rl_module_spec(inference_only=True).rl_module_specs[name].build()
    state = algorithm.learner_group.get_state(components=f"learner/rl_module/{name}")
    weights = state["learner"]["rl_module"][name]
    own = built.state_dict()
    built.set_state({key: value for key, value in weights.items() if key in own})
    return built


def _region_lines(algorithm: RALIS) -> str:
    per_step, labelled = algorithm.settings.ralis.per_step, algorithm.labelled
    pairs = zip(labelled.rows.tolist(), labelled.regions.tolist(), strict=True)
    lines = [
        json.dumps({"number": number, "step": number // per_step, "key": algorithm.train_keys[row], "region": region})
        for number, (row, region) in enumerate(pairs)
    ]
    return "\n".join(lines) + "\n"


def draw_regions(algorithm: RALIS, segmenter: Segmenter, path: Path) -> None:
    """Draws the labelled regions of every budget over the images that most of them come from.

    Args:
        algorithm: of a run that has labelled regions.
        segmenter: whose prediction is drawn beside them.
        path: PNG to write.

    Source: RALIS, Fig. 1.
    """
    store, labelled = algorithm.store, algorithm.labelled
    rows, counts = np.unique(labelled.rows, return_counts=True)
    maps: dict[str, list[np.ndarray]] = {}
    for row in rows[np.argsort(-counts, kind="stable")[:PICTURED_IMAGES]]:
        key = algorithm.train_keys[row]
        nothing: np.ndarray = np.full(store.size(key), UNLABELLED, dtype=np.uint8)
        maps[key] = [
            algorithm.label_store.label(stage, key) if row in algorithm.labelled_at(stage).rows else nothing
            for stage in range(1, algorithm.num_stages + 1)
        ]
    titles = [f"{budget} regions" for budget in algorithm.settings.ralis.budgets]
    draw_label_maps(store, segmenter, maps, titles, path, over_image=True)
