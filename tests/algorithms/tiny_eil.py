"""A small EIL for the tests: 8 images of 48×48, a segmenter of a few channels, everything in this process."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raysseg.algorithms.eil.algorithm import EIL
from raysseg.algorithms.eil.config import EILConfig, EILSettings
from raysseg.algorithms.eil.env_runner import EILEnvRunner
from raysseg.algorithms.eil.learner import EILLearner
from raysseg.algorithms.eil.state import StateBuilder
from raysseg.configuration import load_settings
from raysseg.core import rollout
from raysseg.core.seeding import draw_seeds
from raysseg.core.work import LearnerWork, cut_minibatches

IMAGES = 8

VALUES: dict[str, Any] = {
    "method": "eil",
    "data": {"synthetic": {"train_images": IMAGES, "val_images": 4, "height": 48, "width": 48, "objects": 3}},
    "segmenter": {
        "architecture": "DeepLabV3Plus",
        "encoder": "resnet18",
        "weights": "none",
        "encoder_depth": 3,
        "decoder_channels": 16,
    },
    "training": {
        "pretrain_epochs": 1,
        "stage_epochs": 1,
        "batch_size": 4,
        "optimiser": {"name": "adamw", "learning_rate": 0.003},
        "head_multiplier": 1.0,
        "augmentation": {"crop": [48, 48]},
    },
    "eil": {
        "stages": 2,
        "window": 9,
        "virtual_steps": 0,
        "operators": {"backbone": "resnet18", "weights": "none"},
        "exploration": {"updates_per_stage": 2, "batch_size": 4, "rollout_batch_size": 4},
    },
    "engine": {"updates_per_iteration": 2, "inference_batch_size": 4, "torch_threads": 1, "cache_mib": 64},
}


def changed(values: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Returns a copy of nested values with dotted keys replaced."""
    result = copy.deepcopy(values)
    for dotted, value in changes.items():
        *path, last = dotted.split(".")
        inner = result
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return result


def settings_of(**changes: Any) -> EILSettings:
    """Returns the small settings; `eil__window=5` replaces `eil.window`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return load_settings(EILSettings, changed(VALUES, dotted))


def build(settings: EILSettings, folder: Path, store_uri: str) -> EIL:
    """Builds the algorithm in serial mode, or as the settings say."""
    algorithm = EILConfig().apply(settings, run_dir=str(folder), store_uri=store_uri).build_algo()
    assert isinstance(algorithm, EIL)
    return algorithm


def play(algorithm: EIL) -> list[dict[str, Any]]:
    """Trains to the end and returns the record of every iteration."""
    records = []
    while not algorithm.done:
        algorithm.train()
        records.append(algorithm.record)
    return records


def maps_of(algorithm: EIL, version: int) -> np.ndarray:
    """Returns the label maps of one version, uint8 `[N, H, W]`, in the order of the training split."""
    return np.stack([algorithm.label_store.label(version, key) for key in algorithm.train_keys])


class Bench:
    """A learner and an actor that share their networks, without Ray: what one order or one update does can be looked at."""

    def __init__(self, settings: EILSettings, folder: Path, store_uri: str) -> None:
        self.config = EILConfig().apply(settings, run_dir=str(folder), store_uri=store_uri)
        self.settings = settings
        self.learner = EILLearner(config=self.config, module_spec=self.config.get_multi_rl_module_spec())
        self.learner.build()
        self.runner = EILEnvRunner(config=self.config, worker_index=0)
        self.runner.share_module(self.learner.module)

    @property
    def builder(self) -> StateBuilder:
        """What makes states and applies actions, on the actor's side."""
        return self.runner.env.builder

    def orders(self, count: int = 4, seed: int = 0) -> pa.RecordBatch:
        """Orders the first images under seeds drawn from one seed."""
        return rollout.order(np.arange(count), draw_seeds(seed, "test", count=count))

    def sample(self, seed: int = 0, **context: Any) -> pa.RecordBatch:
        """Rolls out four episodes."""
        values = {"stage": 1, "label_version": 0, "segmenter_version": 0, "policy_version": 0}
        values |= {"noise_std": self.settings.eil.exploration.noise_std}
        values |= {"uniform_share": self.settings.eil.exploration.uniform_share}
        return self.runner.sample(records=self.orders(seed=seed), context={**values, **context})

    def learn(self, records: pa.RecordBatch, *, update: int = 0, total_updates: int = 10) -> dict[str, Any]:
        """Updates the operators once."""
        context = {"update": update, "total_updates": total_updates, "seed": 0}
        return self._update(LearnerWork(kind="operators", records=records, context=context))

    def train_segmenter(self, records: pa.RecordBatch, **context: Any) -> dict[str, Any]:
        """Updates the segmenter on a record batch of orders."""
        values: dict[str, Any] = {
            "version": 0,
            "first_update": 0,
            "total_updates": 10,
            "learning_rate": 0.003,
            "seed": 0,
        }
        values |= {"epoch_ends": [records.num_rows], **context}
        sizes = cut_minibatches(records.num_rows, self.settings.training.batch_size, values["epoch_ends"])
        work = LearnerWork(kind="segmenter", records=records, context=values, minibatches=sizes)
        return self._update(work)

    def _update(self, work: LearnerWork) -> dict[str, Any]:
        numbers = self.learner.update(training_data=work)
        del numbers["timing"]
        return numbers

    def infer(self, stage: int = 1, version: int = 0, thresholds: list[float] | None = None) -> pa.RecordBatch:
        """Infers the label maps of all images."""
        rows = np.arange(IMAGES)
        context = {"stage": stage, "label_version": version, "thresholds": thresholds, "truth": True}
        return self.runner.infer(rows=rows, context={**context, "seeds": draw_seeds(0, "infer", stage, count=IMAGES)})
