"""The RLlib configuration that every method's configuration extends."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import ray
import torch
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec

from raysseg.core.modules import SEGMENTER, SegmenterModule
from raysseg.core.settings import MethodSettings
from raysseg.data import Store, open_dataset
from raysseg.errors import InputError


def any_space() -> dict[str, gymnasium.Space[Any]]:
    """Returns spaces for a module that is built from its `model_config` alone; RLlib insists on some."""
    box = gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    return {"observation_space": box, "action_space": box}


class SegmentationConfig(AlgorithmConfig):
    """RLlib's `AlgorithmConfig` with the typed settings of a raysseg variant in `settings`.

    Everything that the settings say about actors, learners and GPUs is carried over to RLlib's own keys; nothing else
    of RLlib is changed, so its other keys (fault tolerance, callbacks, debugging) work as documented there.
    """

    def __init__(self, algo_class: type | None = None) -> None:
        super().__init__(algo_class=algo_class)
        self.settings: MethodSettings | None = None
        self.store_uri: str = ""
        self.run_dir: str = ""

    def apply(self, settings: MethodSettings, *, run_dir: str, store_uri: str | None = None) -> SegmentationConfig:
        """Takes over the settings.

        Args:
            settings: the variant's settings.
            run_dir: folder for label versions and, under `data/`, the store that a reader builds.
            store_uri: an Arrow store that exists already; else `settings.data` is read into one.

        Raises:
            InputError: the data cannot be read, or more GPUs are asked for than exist.
        """
        engine = settings.engine
        learner_gpus = engine.num_gpus_per_learner
        if learner_gpus == "auto":
            learner_gpus = 1.0 if torch.cuda.is_available() else 0.0
        if not os.environ.get("RAY_ADDRESS"):
            self._check_gpus(
                float(learner_gpus) * max(1, engine.num_learners)
                + engine.num_env_runners * engine.num_gpus_per_env_runner
            )
        self.settings = settings
        # Actors on other nodes have other working directories.
        self.run_dir = run_dir if "://" in run_dir else str(Path(run_dir).absolute())
        self.store_uri = store_uri or open_dataset(settings.data, f"{self.run_dir}/data").uri
        self.api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
        self.framework("torch")
        self.env_runners(
            num_env_runners=engine.num_env_runners,
            create_local_env_runner=engine.num_env_runners == 0,
            num_cpus_per_env_runner=engine.num_cpus_per_env_runner,
            num_gpus_per_env_runner=engine.num_gpus_per_env_runner,
        )
        self.learners(
            num_learners=engine.num_learners,
            num_cpus_per_learner=engine.num_cpus_per_learner,
            num_gpus_per_learner=learner_gpus,
        )
        self.debugging(seed=settings.seed, log_level="ERROR")
        self.fault_tolerance(restart_failed_env_runners=True, delay_between_env_runner_restarts_s=1.0)
        # RLlib would ask every actor for connector states after each iteration, and wait for a silent one.
        self._dont_auto_sync_env_runner_states = True
        self.reporting(min_time_s_per_iteration=None, min_sample_timesteps_per_iteration=None)
        return self

    def see_cluster(self) -> None:
        """Gives every remote learner a GPU where the cluster has some and the settings leave it open.

        The driver that applied the settings may be on a node without any. Called once Ray is connected.
        """
        assert self.settings is not None
        engine = self.settings.engine
        if engine.num_learners > 0 and engine.num_gpus_per_learner == "auto":
            self.learners(num_gpus_per_learner=1.0 if ray.cluster_resources().get("GPU", 0.0) > 0 else 0.0)

    @staticmethod
    def _check_gpus(wanted: float) -> None:
        """Raises `InputError` where this process sees no cluster and fewer GPUs than wanted."""
        existing = ray.cluster_resources().get("GPU", 0.0) if ray.is_initialized() else torch.cuda.device_count()
        if wanted > existing:
            raise InputError(
                f"The engine asks for {wanted:g} GPUs (num_env_runners × num_gpus_per_env_runner + "
                f"num_learners × num_gpus_per_learner), "
                f"but {existing:g} exist."
            )

    @property
    def labels_uri(self) -> str:
        """Where the label versions of this run are."""
        return f"{self.run_dir}/labels"

    def segmenter_spec(self) -> RLModuleSpec:
        """Returns the specification of the segmenter's module."""
        assert self.settings is not None
        return RLModuleSpec(
            module_class=SegmenterModule,
            **any_space(),
            model_config={
                "segmenter": self.settings.segmenter.model_dump(),
                "num_classes": Store.open(self.store_uri).info.num_classes,
                "seed": self.settings.seed,
                "pretrained": self.settings.training.pretrained,
            },
        )

    def method_specs(self) -> dict[str, RLModuleSpec]:
        """Returns the specifications of the method's own modules."""
        return {}

    def get_multi_rl_module_spec(self, *, inference_only: bool = False, **kwargs: Any) -> MultiRLModuleSpec:
        """Returns the segmenter and the method's own modules as one specification."""
        specs = {SEGMENTER: self.segmenter_spec(), **self.method_specs()}
        for spec in specs.values():
            spec.inference_only = inference_only
        return MultiRLModuleSpec(rl_module_specs=specs)

    @property
    def is_multi_agent(self) -> bool:
        """One agent decides; the segmenter's module is not an agent."""
        return False
