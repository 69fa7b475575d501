"""What becomes context: every policy's choice by hand, the steps of a trained variant, and that the Context Net can learn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from algorithms.tiny_cissnet import settings_of

from raysseg.algorithms.cissnet.config import CiSSNetOptions
from raysseg.algorithms.cissnet.episode import ContextEpisode
from raysseg.algorithms.cissnet.features import _stride, feature_shape
from raysseg.algorithms.cissnet.module import ContextNetworks
from raysseg.algorithms.cissnet.networks import ContextNet, PyramidEncoder
from raysseg.algorithms.cissnet.policies import POLICIES, Observation
from raysseg.algorithms.cissnet.segmenter import ContextSegmenter
from raysseg.errors import InputError
from raysseg.functional.constants import PADDING
from raysseg.functional.pixel_policy import action_entropy, action_log_probabilities, actor_critic_losses
from raysseg.segmenters import build_segmenter

CLASSES = 5


def options_of(**changes: Any) -> CiSSNetOptions:
    """The options of the small settings."""
    return settings_of(**changes).cissnet


def observation_of(**changes: Any) -> Observation:
    """Two images of 3 × 4 positions."""
    logits = torch.randn(2, CLASSES, 3, 4, generator=torch.Generator().manual_seed(0))
    return Observation(predictions=logits.argmax(1).to(torch.uint8), logits=logits, **changes)


def test_p_map_takes_everything() -> None:
    assert POLICIES["p-map"](observation_of(), None, options_of()).actions.all()


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_greedy_takes_the_most_confident_share_of_each_image(share: float) -> None:
    observation = observation_of()
    options = options_of(cissnet__policy="greedy", cissnet__greedy_share=share)
    actions = POLICIES["greedy"](observation, None, options).actions
    confidence = observation.logits.softmax(1).amax(1)
    for image in range(2):
        taken, left = confidence[image][actions[image]], confidence[image][~actions[image]]
        assert len(taken) == round(12 * share)
        assert not len(left) or taken.min() > left.max()


def test_the_oracle_takes_what_is_right_and_nothing_void() -> None:
    observation = observation_of()
    labels = observation.predictions.clone()
    labels[0, 0], labels[1, 1], labels[1, 2] = (labels[0, 0] + 1) % CLASSES, 255, 254
    actions = POLICIES["oracle"](observation_of(labels=labels), None, options_of(cissnet__policy="oracle")).actions
    expected = torch.ones(2, 3, 4, dtype=torch.bool)
    expected[0, 0], expected[1, 1:] = False, False
    assert torch.equal(actions, expected)
    with pytest.raises(InputError, match="needs label maps"):
        POLICIES["oracle"](observation, None, options_of(cissnet__policy="oracle"))


def test_the_context_net_draws_from_its_probabilities() -> None:
    torch.manual_seed(0)
    net = ContextNet(6, PyramidEncoder(CLASSES, 8, 4), 16, 4)
    torch.nn.init.normal_(net.policy.bias, std=2.0)
    features, predictions = torch.randn(2, 6, 20, 30), torch.randint(0, CLASSES, (2, 20, 30)).to(torch.uint8)
    prepared = net.prepare(features)
    shares = torch.softmax(net(prepared, predictions)[0], 1)[:, 1]

    def choose(seeds: torch.Tensor | None) -> Any:
        logits = torch.zeros(2, CLASSES, 20, 30)
        observation = Observation(predictions=predictions, logits=logits, prepared=prepared, seeds=seeds)
        return POLICIES["context"](observation, net, options_of())

    drawn, again, other = (choose(torch.tensor(seeds)) for seeds in ([3, 4], [3, 4], [3, 5]))
    assert torch.equal(drawn.actions, again.actions)
    assert torch.equal(drawn.actions[0], other.actions[0])
    assert not torch.equal(drawn.actions[1], other.actions[1])
    torch.testing.assert_close(drawn.probabilities, torch.where(drawn.actions, shares, 1 - shares))
    assert float(drawn.actions.float().mean()) == pytest.approx(float(shares.detach().mean()), abs=0.05)
    assert torch.equal(choose(None).actions, shares > 0.5)


def test_the_scored_steps_are_those_of_one_episode() -> None:
    settings = settings_of()
    torch.manual_seed(0)
    segmenter = build_segmenter(settings.segmenter, CLASSES).eval()
    channels, stride = feature_shape(segmenter, "pyramid")
    network = settings.cissnet.network.model_dump()
    networks = ContextNetworks(network, channels, CLASSES, uses_context=True, learns=True).eval()
    assert networks.bias is not None
    torch.nn.init.normal_(networks.bias.last.weight)
    played = ContextSegmenter(segmenter, networks, settings.cissnet).eval()
    images = torch.randn(2, 3, 40, 48)
    with torch.no_grad():
        found = played.step_logits(images, (0, 2, 3))
        episode = played.play(images)
        expected = [episode.logits]
        for _ in range(3):
            episode.advance(episode.choose().actions)
            expected.append(episode.logits)
    assert found[0].shape[-2:] == (40 // stride, 48 // stride)
    for one, step in zip(found, (0, 2, 3), strict=True):
        assert torch.equal(one, expected[step])
    assert not torch.equal(found[1], found[0])
    with torch.no_grad():
        assert torch.equal(played(images).logits, expected[settings.cissnet.inference.steps])


@pytest.mark.parametrize("policy", ["context", "p-map", "greedy", "oracle"])
def test_what_lies_beside_an_image_is_never_context(policy: str) -> None:
    torch.manual_seed(0)
    settings = settings_of(cissnet__policy=policy)
    network = settings.cissnet.network.model_dump()
    networks = ContextNetworks(network, 6, CLASSES, uses_context=True, learns=policy == "context").eval()
    assert networks.bias is not None
    torch.nn.init.normal_(networks.bias.last.weight)
    features, labels = torch.randn(2, 6, 6, 6), torch.randint(0, CLASSES, (2, 6, 6)).to(torch.uint8)
    labels[0, 3:] = PADDING
    with torch.no_grad():
        episode = ContextEpisode(networks, settings.cissnet, features, labels)
        actions = episode.choose(torch.tensor([1, 2])).actions
        assert not actions[0, 3:].any()
        assert actions[0, :3].any()
        if policy == "greedy":
            assert actions.flatten(1).sum(1).tolist() == [9, 18], "half of what is on the image"
        everywhere = ContextEpisode(networks, settings.cissnet, features, labels)
        kept, asked = actions.clone(), actions.clone()
        asked[0, 3:] = True
        assert torch.equal(episode.advance(kept), everywhere.advance(asked))
        assert torch.equal(episode.logits, everywhere.logits)


def test_features_are_found_on_any_device_and_refused_without_positions() -> None:
    segmenter = build_segmenter(settings_of().segmenter, CLASSES)
    assert feature_shape(segmenter.to("meta"), "pyramid") == feature_shape(
        build_segmenter(settings_of().segmenter, CLASSES), "pyramid"
    )
    with pytest.raises(InputError, match=r"ends in maps \[1, 8, 0, 0\] of an image of 64 pixels"):
        _stride([torch.zeros(1, 3, 64, 64), torch.zeros(1, 8, 0, 0)])


def test_the_context_net_learns_what_is_worth_taking() -> None:
    """One step at a time, positions are right where the first feature says so: taking pays 0.4 there, leaving 0.2."""
    torch.manual_seed(0)
    net = ContextNet(4, PyramidEncoder(CLASSES, 8, 4), 16, 4).train()
    optimiser = torch.optim.Adam(net.parameters(), 0.01)
    generator = torch.Generator().manual_seed(1)
    for _ in range(120):
        features = torch.randn(4, 4, 8, 8, generator=generator)
        predictions = torch.randint(0, CLASSES, (4, 8, 8), generator=generator)
        logits, values = net(net.prepare(features), predictions)
        actions = torch.rand(4, 8, 8, generator=generator) < logits.softmax(1)[:, 1]
        rewards = torch.where(actions, 0.4 * (features[:, 0] > 0), 0.2)
        losses = actor_critic_losses(
            action_log_probabilities(logits, actions)[None],
            (rewards - values.detach())[None],
            values[None],
            rewards[None],
            action_entropy(logits)[None],
            torch.ones(4, 8, 8, dtype=torch.bool),
        )
        optimiser.zero_grad()
        (losses[0] + losses[1] + 0.05 * losses[2]).backward()
        optimiser.step()
    features = torch.randn(4, 4, 8, 8, generator=generator)
    predictions = torch.randint(0, CLASSES, (4, 8, 8), generator=generator)
    with torch.no_grad():
        shares = net(net.prepare(features), predictions)[0].softmax(1)[:, 1]
    assert shares[features[:, 0] > 0.3].mean() > 0.8
    assert shares[features[:, 0] < -0.3].mean() < 0.2
