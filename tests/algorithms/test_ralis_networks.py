"""RALIS' query network against the authors' sizes, and its normalisation against numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from raysseg.algorithms.ralis.module import QueryNetwork, RunningNorm

CAMVID = {"state_size": 240, "state_features": 204, "action_features": 268, "histograms": 64}
CITYSCAPES = {"state_size": 1280, "state_features": 212, "action_features": 276, "histograms": 64}


def small(**changes: object) -> QueryNetwork:
    torch.manual_seed(0)
    values = {"state_size": 6, "state_features": 5, "action_features": 9, "histograms": 4, **changes}
    network = QueryNetwork(**values)  # type: ignore[arg-type]
    network.train()(torch.randn(8, 6, 5), torch.randn(8, 16, values["action_features"]))  # type: ignore[call-overload]
    for norm in network.running_norms():
        norm.absorb(norm.take_sums())
    return network


@pytest.mark.parametrize(("sizes", "millions"), [(CAMVID, 0.390), (CITYSCAPES, 0.532)])
def test_it_has_the_parameters_of_the_authors_network(sizes: dict[str, int], millions: float) -> None:
    parameters = sum(parameter.numel() for parameter in QueryNetwork(**sizes).parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.0006)


@pytest.mark.parametrize("normalisation", ["running", "layer"])
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


def test_values_do_not_depend_on_the_batch_in_training_either() -> None:
    network = small().train()
    states, candidates = torch.randn(4, 6, 5), torch.randn(4, 3, 9)
    together = network(states, candidates)
    torch.testing.assert_close(network(states[2:3], candidates[2:3]), together[2:3])
    torch.testing.assert_close(network.eval()(states, candidates), together)


def test_a_new_network_lets_its_state_through() -> None:
    for seed in range(8):
        torch.manual_seed(seed)
        network = QueryNetwork(state_size=6, state_features=5, action_features=5, histograms=0).train()
        state = torch.randn(4, 6, 5, requires_grad=True)
        network(state, torch.randn(4, 3, 5)).sum().backward()
        assert (state.grad.flatten(1).abs().sum(1) > 0).all(), f"seed {seed}"


def test_statistics_begin_with_the_first_batch_and_move_by_a_share_of_the_next() -> None:
    norm = RunningNorm(2, momentum=0.75).train()
    first = torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]])
    torch.testing.assert_close(norm(first[1:])[:, 0], torch.tensor([-1.0, 1.0]), msg="nothing is known: its own")
    norm(first[None, :1])
    sums = norm.take_sums()
    assert sums.tolist() == [[3.0, 3.0], [9.0, 6.0], [35.0, 36.0]]
    norm.absorb(sums)
    assert norm.mean.tolist() == [3.0, 2.0]
    torch.testing.assert_close(norm.variance, torch.tensor([35 / 3 - 9, 12 - 4.0]))
    assert norm.take_sums().abs().sum() == 0, "sums are taken once"
    torch.testing.assert_close(norm(torch.tensor([[7.0, 2.0]]))[0, 0].item(), 4 / (35 / 3 - 9 + 1e-5) ** 0.5)
    norm.absorb(norm.take_sums())
    assert norm.mean.tolist() == [3 + 0.75 * 4, 2.0], "the second batch has the share 3/4, as 1/2 is less"
    torch.testing.assert_close(norm.eval()(norm.mean[None]), torch.zeros(1, 2))
    assert norm.take_sums().abs().sum() == 0, "nothing is noted outside of training"
