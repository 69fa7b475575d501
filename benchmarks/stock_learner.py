"""EIL's operators on RLlib's own plumbing: dense episodes, its replay buffer, its connectors and its update.

This is what a user of RLlib 2.60 would write without raysseg's records: the actor's observations (the operators' planes
of s and s') go into `SingleAgentEpisode`s, those into `EpisodeReplayBuffer`, samples of it through the learner connector
pipeline of RLlib's DQN and SAC, and the batch into a `TorchLearner` with RLlib's update: forward_train, compute_losses,
compute_gradients, apply_gradients, Polyak targets. The networks, their optimisers and losses (Eq. 4 to 7) are EIL's.
Where RLlib leaves a choice, the cheaper one is taken: gradients are asked for the optimiser's own parameters only
(RLlib's SAC passes back through both networks), and the driver's metrics are not collected.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from ray.rllib.algorithms.dqn import DQNConfig
from ray.rllib.connectors.common.add_observations_from_episodes_to_batch import AddObservationsFromEpisodesToBatch
from ray.rllib.connectors.learner.add_next_observations_from_episodes_to_train_batch import (
    AddNextObservationsFromEpisodesToTrainBatch,
)
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.multi_rl_module import MultiRLModuleSpec
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.env.single_agent_episode import SingleAgentEpisode
from ray.rllib.utils.metrics import NUM_ENV_STEPS_SAMPLED_LIFETIME
from ray.rllib.utils.replay_buffers.episode_replay_buffer import EpisodeReplayBuffer
from ray.rllib.utils.torch_utils import update_target_network

from raysseg.algorithms.eil.config import EILSettings
from raysseg.algorithms.eil.module import OperatorsModule
from raysseg.core.config import any_space
from raysseg.core.schedules import build_optimiser
from raysseg.core.settings import OptimiserSettings
from raysseg.core.workspace import low_precision
from raysseg.functional.ddpg import assessor_loss, bootstrap_target, searcher_loss

VALUES, ACTION_VALUES, NEXT_VALUES, SEARCHED = "values", "action_values", "next_values", "searched_actions"
NETWORKS = ("assessor", "searcher")


class StockModule(OperatorsModule):
    """The same networks with RLlib's forward pass for training; `model_config` also carries `precision`."""

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        planes, following = batch[Columns.OBS], batch[Columns.NEXT_OBS]
        dtype = low_precision(self.model_config["precision"], planes.device)
        with torch.autocast(planes.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            with torch.no_grad():
                next_actions = self.target_searcher.eval()(following).float()
                next_values = self.target_assessor.eval()(following, next_actions).float()
            values = self.assessor.train()(planes, batch[Columns.ACTIONS])
            actions = self.searcher.train()(planes)
            action_values = self.assessor.eval()(planes, actions)
        return {
            VALUES: values.float(),
            SEARCHED: actions,
            ACTION_VALUES: action_values.float(),
            NEXT_VALUES: next_values,
        }


class StockLearner(TorchLearner):
    """RLlib's update with two losses and two optimisers, as its SAC has them."""

    def build(self) -> None:
        """Builds connectors, networks and optimisers; s' joins the batch as in RLlib's DQN and SAC."""
        super().build()
        self._learner_connector.insert_after(
            AddObservationsFromEpisodesToBatch, AddNextObservationsFromEpisodesToTrainBatch()
        )
        self._losses: dict[str, torch.Tensor] = {}

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Registers the optimiser of each network."""
        for name in NETWORKS:
            settings = OptimiserSettings(**self.config.learner_config_dict[name])
            parameters = self.get_parameters(getattr(self.module[module_id], name))
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=build_optimiser(settings, parameters),
                params=parameters,
                lr_or_lr_schedule=settings.learning_rate,
            )

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Eq. 4 to 7."""
        target = bootstrap_target(
            batch[Columns.REWARDS], fwd_out[NEXT_VALUES], batch[Columns.TERMINATEDS].bool(), config.gamma
        )
        self._losses = {
            "assessor": assessor_loss(fwd_out[VALUES], target),
            "searcher": searcher_loss(fwd_out[ACTION_VALUES]),
        }
        self.metrics.log_dict(
            {f"{name}_loss": loss.detach() for name, loss in self._losses.items()}, key=module_id, window=1
        )
        return self._losses["assessor"] + self._losses["searcher"]

    def compute_gradients(self, loss_per_module: dict[str, torch.Tensor], **kwargs: Any) -> dict[Any, torch.Tensor]:
        """Passes each loss back to the parameters of its own network."""
        gradients: dict[Any, torch.Tensor] = {}
        for name in NETWORKS:
            optimiser = self.get_optimizer(DEFAULT_MODULE_ID, name)
            optimiser.zero_grad(set_to_none=True)
            own = self.filter_param_dict_for_optimizer(self._params, optimiser)
            found = torch.autograd.grad(self._losses[name], list(own.values()), retain_graph=name == "assessor")
            gradients.update(zip(own, found, strict=True))
        return gradients

    def after_gradient_based_update(self, *, timesteps: dict[str, Any]) -> None:
        """Moves the targets with RLlib's Polyak average."""
        super().after_gradient_based_update(timesteps=timesteps)
        module = self.module[DEFAULT_MODULE_ID].unwrapped()
        for name in NETWORKS:
            update_target_network(
                main_net=getattr(module, name),
                target_net=getattr(module, f"target_{name}"),
                tau=self.config.tau,
            )


def build_stock(settings: EILSettings, *, num_classes: int, feature_channels: int) -> LearnerGroup:
    """Builds RLlib's learner group with the networks, optimisers and constants of a variant."""
    exploration = settings.eil.exploration
    config = (
        DQNConfig()
        .api_stack(enable_rl_module_and_learner=True, enable_env_runner_and_connector_v2=True)
        .framework("torch")
        .training(
            gamma=settings.eil.gamma,
            tau=exploration.kappa,
            learner_class=StockLearner,
            learner_config_dict={
                "assessor": exploration.assessor_optimiser.model_dump(),
                "searcher": exploration.searcher_optimiser.model_dump(),
            },
        )
        .learners(num_learners=settings.engine.num_learners, num_gpus_per_learner=settings.engine.num_gpus_per_learner)
        .debugging(log_level="ERROR")
    )
    specification = RLModuleSpec(
        module_class=StockModule,
        **any_space(),
        model_config={
            "eil": settings.eil.model_dump(),
            "num_classes": num_classes,
            "feature_channels": feature_channels,
            "seed": settings.seed,
            "precision": settings.engine.precision,
        },
    )
    return config.build_learner_group(
        rl_module_spec=MultiRLModuleSpec(rl_module_specs={DEFAULT_MODULE_ID: specification})
    )


def episode(
    planes: np.ndarray, action: np.ndarray, reward: float, next_planes: np.ndarray, terminated: bool, env: Any
) -> SingleAgentEpisode:
    """Makes the episode of one step that RLlib's env runner would hand over, in NumPy arrays as it does."""
    one = SingleAgentEpisode(
        observation_space=env.single_observation_space, action_space=env.single_action_space, len_lookback_buffer=0
    )
    one.add_env_reset(planes)
    one.add_env_step(next_planes, action, reward, terminated=terminated, truncated=not terminated)
    return one.to_numpy()


def sample(buffer: EpisodeReplayBuffer, count: int, gamma: float) -> list[SingleAgentEpisode]:
    """Draws episodes of one step with the arguments that RLlib's DQN and SAC give."""
    return buffer.sample(
        num_items=count,
        n_step=1,
        batch_length_T=0,
        lookback=0,
        min_batch_length_T=0,
        gamma=gamma,
        beta=None,
        sample_episodes=True,
    )


def update(group: LearnerGroup, episodes: list[SingleAgentEpisode], steps: int) -> dict[str, Any]:
    """Does one update as RLlib's DQN and SAC do; returns the module's results."""
    return group.update(episodes=episodes, timesteps={NUM_ENV_STEPS_SAMPLED_LIFETIME: steps})[0][DEFAULT_MODULE_ID]


def nbytes(episodes: list[SingleAgentEpisode]) -> int:
    """Bytes of the arrays in episodes, without Python's objects around them."""
    return sum(one.get_observations().nbytes + one.get_actions().nbytes + one.get_rewards().nbytes for one in episodes)
