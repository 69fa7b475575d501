"""RALIS' query network against the authors' sizes; what its gate sees, and what its normalisation depends on."""

from __future__ import annotations

import pytest
import torch

from raysseg.algorithms.ralis.module import QueryNetwork

CAMVID = {"state_size": 240, "state_features": 204, "action_features": 268, "histograms": 64}
CITYSCAPES = {"state_size": 1280, "state_features": 212, "action_features": 276, "histograms": 64}


def small(**changes: object) -> QueryNetwork:
    torch.manual_seed(0)
    values = {"state_size": 6, "state_features": 5, "action_features": 9, "histograms": 4, **changes}
    network = QueryNetwork(**values)  # type: ignore[arg-type]
    network.train()(torch.randn(8, 6, 5), torch.randn(8, 16, values["action_features"]))  # type: ignore[call-overload]
    return network


@pytest.mark.parametrize(("sizes", "millions"), [(CAMVID, 0.390), (CITYSCAPES, 0.532)])
def test_it_has_the_parameters_of_the_authors_network(sizes: dict[str, int], millions: float) -> None:
    parameters = sum(parameter.numel() for parameter in QueryNetwork(**sizes).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.0006)


@pytest.mark.parametrize("normalisation", ["batch", "layer"])
def test_one_state_for_all_rows_and_an_index_give_what_repeated_states_give(normalisation: str) -> None:
    network = small(normalisation=normalisation).eval()
    states, candidates = torch.randn(2, 6, 5), torch.randn(3, 7, 9)
    repeated = network(states[[1, 0, 1]], candidates)
    assert repeated.shape == (3, 7)
    torch.testing.assert_close(network(states, candidates, torch.tensor([1, 0, 1])), repeated)
    torch.testing.assert_close(network(states[1:], candidates)[0], repeated[0])
    assert not torch.allclose(repeated[0], network(states[:1], candidates)[0]), "the state matters"


def test_the_gate_sees_the_histograms_alone_and_scales_what_the_rest_says() -> None:
    network = small().eval()
    state, candidates = torch.randn(1, 6, 5), torch.randn(1, 4, 9)
    base = network(state, candidates)
    gate = network.gate(candidates[..., 5:]).squeeze(-1).sigmoid()
    changed = candidates.clone()
    changed[..., 5:] = torch.randn(1, 4, 4)
    other = network.gate(changed[..., 5:]).squeeze(-1).sigmoid()
    torch.testing.assert_close(network(state, changed), base / gate * other)
    assert ((gate > 0) & (gate < 1)).all()


def test_without_histograms_there_is_no_gate() -> None:
    network = small(action_features=5, histograms=0).eval()
    assert network.gate is None
    assert network(torch.randn(1, 6, 5), torch.randn(1, 4, 5)).shape == (1, 4)
    with pytest.raises(ValueError, match="9 numbers; 5 of its region and 3"):
        small(histograms=3)


def test_what_it_is_trained_with_and_what_it_scores_with() -> None:
    network, states, candidates = small(), torch.randn(2, 6, 5), torch.randn(8, 1, 9)
    index = torch.tensor([0, 1] * 4)
    trained = network.train()(states, candidates, index)
    assert not torch.allclose(trained[:4], network(states, candidates[:4], index[:4])), "statistics of the batch"
    scored = network.eval()(states, candidates, index)
    torch.testing.assert_close(network(states, candidates[:4], index[:4]), scored[:4])


def test_one_state_alone_can_be_trained_with() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        network = QueryNetwork(state_size=6, state_features=5, action_features=5, histograms=0).train()
        state = torch.randn(1, 6, 5, requires_grad=True)
        network(state, torch.randn(4, 3, 5)).square().sum().backward()
        assert state.grad.abs().sum() > 0, f"seed {seed}"
