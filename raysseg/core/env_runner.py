"""The actor: rolls out episodes, infers label maps and scores images, each as ordered by the driver.

Which images, under which seeds, is always part of the order, so the same order gives the same result on whichever
actor, and an order whose actor died can be given to another one.
"""

from __future__ import annotations

import abc
import functools
import operator
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from gymnasium import Space
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModule
from ray.rllib.env.env_runner import EnvRunner
from ray.rllib.utils.checkpoints import Checkpointable

from raysseg.core.actor_pool import Weights
from raysseg.core.config import SegmentationConfig
from raysseg.core.modules import SEGMENTER, SegmenterModule
from raysseg.core.weights import load_weights
from raysseg.core.workspace import Workspace, choose_device
from raysseg.data.batches import GROUND_TRUTH, DeviceDataset
from raysseg.evaluation import Counts, predict_probabilities, tells_objects_apart
from raysseg.functional.label_inference import predicted_classes


class SegmentationEnvRunner(EnvRunner, Checkpointable):
    """RLlib's actor over a `SegmentationVectorEnv`. A method implements `make_env`, `spaces` and `sample`."""

    def __init__(self, *, config: SegmentationConfig, **kwargs: Any) -> None:
        EnvRunner.__init__(self, config=config, **kwargs)
        assert config.settings is not None
        self.settings = config.settings
        if self.settings.engine.torch_threads and self.worker_index:
            torch.set_num_threads(self.settings.engine.torch_threads)
        gpus = config.num_gpus_per_env_runner if self.worker_index else config.num_gpus_per_learner
        self.device = choose_device(gpus)
        self.workspace = Workspace(self.settings, config.store_uri, config.labels_uri, self.device)
        self.module: MultiRLModule | None = None
        self.pulled: dict[str, int] = {}
        if self.worker_index:
            self.make_module()
        self.make_env()

    def make_module(self) -> None:
        """Builds this actor's own networks; in serial mode the learner's are shared instead (`share_module`)."""
        self.module = self.config.get_multi_rl_module_spec(inference_only=True).build()
        for module in self.module.values():
            module.to(self.device).eval()

    def share_module(self, module: MultiRLModule) -> None:
        """Uses the learner's own networks: in one process nothing needs to be copied."""
        self.module = module

    @property
    def segmenter(self) -> SegmenterModule:
        """The segmenter's module."""
        assert self.module is not None
        return self.module[SEGMENTER]

    @abc.abstractmethod
    def sample(self, *, records: pa.RecordBatch, context: dict[str, Any]) -> pa.RecordBatch:  # type: ignore[override]
        """Rolls out the ordered episodes.

        Args:
            records: columns `row` and `seed`, one ordered episode each.
            context: what holds for all of them (stage, versions, noise).

        Returns:
            Transitions in the schema of `raysseg.core.rollout`.
        """

    def evaluate(self, *, rows: np.ndarray, split: str) -> Counts:
        """Scores images of a split against their ground truth.

        Args:
            rows: int64 `[N]` rows of the split.
            split: its name.

        Returns:
            What was counted over them, on the CPU.
        """
        data = self.workspace.split(split)
        settings = self.settings.evaluation
        network = self.segmenter.online.eval()

        def count() -> Iterator[Counts]:
            for index in self.inference_batches(rows):
                images, sizes = data.images(index)
                probabilities = predict_probabilities(
                    network,
                    images,
                    sizes,
                    scales=settings.scales,
                    flip=settings.flip,
                    autocast_dtype=self.workspace.low_precision,
                )
                yield Counts.of(
                    predicted_classes(probabilities),
                    data.labels(index, GROUND_TRUTH),
                    self.workspace.num_classes,
                    instances=self.scored_instances(data, index),
                    sizes=sizes,
                )

        return functools.reduce(operator.add, count()).cpu()

    def inference_batches(self, rows: np.ndarray) -> list[torch.Tensor]:
        """Cuts rows int64 `[N]` into batches of at most `engine.inference_batch_size`, int64 `[B]` on the device."""
        parts = np.array_split(rows, max(1, -(-len(rows) // self.settings.engine.inference_batch_size)))
        return [torch.tensor(part, device=self.device) for part in parts]

    def scored_instances(self, data: DeviceDataset, rows: torch.Tensor) -> torch.Tensor | None:
        """Returns the instances int32 `[B, H, W]` of some rows int64 `[B]`, where the split has Cityscapes' own."""
        if data.has_instances and tells_objects_apart(self.workspace.store.info.class_names):
            return data.instances(rows)
        return None

    def get_spaces(self) -> dict[str, tuple[Space[Any], Space[Any]]]:
        """Returns the spaces of the environment, under RLlib's names."""
        env = self.env
        single = (env.single_observation_space, env.single_action_space)
        batched = (env.observation_space, env.action_space)
        return {"__env__": batched, "__env_single__": single, **dict.fromkeys(self.config.method_specs(), single)}

    def assert_healthy(self) -> None:
        """Raises `AssertionError` where the constructor has not finished."""
        assert self.env is not None

    def get_metrics(self) -> dict[str, Any]:
        """Returns RLlib's metrics; what raysseg measures travels in the rollouts."""
        return self.metrics.reduce()

    def pull_weights(self, weights: Weights) -> None:
        """Takes over the weights that are newer than this actor's own, from the object store of its node.

        Args:
            weights: module id to the number of the newest published weights and where they are.
        """
        newer = {module: entry for module, entry in weights.items() if entry[0] > self.pulled.get(module, 0)}
        for number in {number for number, _ in newer.values()}:
            modules = [module for module, entry in newer.items() if entry[0] == number]
            packed = ray.get(newer[modules[0]][1][0])
            assert self.module is not None
            # A publication may hold modules that have been published again since, which this actor takes from there.
            load_weights(
                {module: self.module[module] for module in modules}, {module: packed[module] for module in modules}
            )
            self.pulled |= dict.fromkeys(modules, number)

    def get_state(
        self,
        components: str | Collection[str] | None = None,
        *,
        not_components: str | Collection[str] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns nothing: all that an actor knows comes with its orders."""
        return {}

    def set_state(self, state: dict[str, Any] | ray.ObjectRef) -> None:
        """Ignores RLlib's states: weights are pulled with the next order."""

    def get_ctor_args_and_kwargs(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns what the constructor needs."""
        return (), {"config": self.config}

    def get_checkpointable_components(self) -> list[tuple[str, Checkpointable]]:
        """Returns none: the learner holds the networks."""
        return []

    def stop(self) -> None:
        """Closes the environment."""
        if self.env is not None:
            self.env.close()
