"""Times CiSS-Net's networks with the part of their first convolutions that sees X computed once, against once per step.

    OMP_NUM_THREADS=1 python benchmarks/cached_convolution.py                 # the paper's channels, 30×30 positions
    python benchmarks/cached_convolution.py --positions 60 --repeats 3
    python benchmarks/cached_convolution.py --device cuda --precision bf16 --positions 60

The same networks with the same weights play both ways; in the plain one every first convolution is an `nn.Conv2d` of X and the
encoded map, stacked, at every step, as the authors' code has it. Everything else is shared: the Base Net, the encoders, the
other layers, the draws of actions. X is random (no layer's time depends on its values) and its own making is not timed.

A rollout is the Base Net, then per step the Context Net, the draw of its actions and the Bias Net, without gradient: T = 8 is
one of training, T = 2 one of inference. The learner's pass is all steps of a given episode at once (`ContextNetworks.forward`)
against step by step and plain; once forward alone, once with the backward pass into every parameter. Both ways take turns,
and which is first changes. Beside the ratio of times stands that of the convolutions' multiplications, which is what a machine
that loses nothing would reach. The largest difference of logits is that of the learner's pass, where both see the same contexts; in
rollouts of their own a difference of rounding may turn a prediction, and then all that follows: how many positions end
differently is printed with each rollout. On a CPU the ratio of the process's CPU time stands beside that of wall time: with one
thread it does not count the time that other processes take.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from raysseg.algorithms.cissnet.config import CiSSNetOptions, NetworkOptions
from raysseg.algorithms.cissnet.episode import ContextEpisode, context_map
from raysseg.algorithms.cissnet.module import ContextNetworks, Played
from raysseg.algorithms.cissnet.networks import SplitConv2d


class PlainConv2d(nn.Module):
    """The convolution of both stacks at every step, under the names that its split form has."""

    def __init__(self, split: SplitConv2d) -> None:
        super().__init__()
        self.convolution = split.convolution

    def prepare(self, maps: Tensor) -> Tensor:
        """Keeps X as it is."""
        return maps

    def forward(self, prepared: Tensor, maps: Tensor) -> Tensor:
        """Convolves X `[B, fixed, h, w]` and the maps of one step `[B, varying, h, w]`."""
        return self.convolution(torch.cat([prepared, maps], 1))


@contextlib.contextmanager
def plain(networks: ContextNetworks) -> Iterator[None]:
    """Gives Bias and Context Net their plain first convolutions meanwhile."""
    assert networks.bias is not None
    assert networks.context is not None
    trunks = (networks.bias.trunk, networks.context.trunk)
    kept = [trunk.first for trunk in trunks]
    try:
        for trunk, split in zip(trunks, kept, strict=True):
            trunk.first = PlainConv2d(split)  # type: ignore[assignment]
        yield
    finally:
        for trunk, split in zip(trunks, kept, strict=True):
            trunk.first = split


class Episode(NamedTuple):
    """What a rollout was: p-maps uint8 `[T+1, B, h, w]` and actions bool `[T, B, h, w]`."""

    predictions: Tensor
    actions: Tensor


class Bench:
    """Networks, X and episodes of one setting.

    Args:
        options: of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.device, self.low = torch.device(options.device), options.precision == "bf16"
        network = NetworkOptions(
            width=options.width, context_width=options.encoded, prediction_width=options.encoded, dropout=0.0
        )
        self.options = CiSSNetOptions(network=network)
        torch.manual_seed(0)
        self.networks = ContextNetworks(
            network.model_dump(), options.features, options.classes, uses_context=True, learns=True
        ).to(self.device)
        assert self.networks.bias is not None
        # Before learning the Bias Net says nothing, and any two ways of it the same.
        self.networks.bias.last.reset_parameters()
        size = (options.batch, options.features, options.positions, options.positions)
        self.features = torch.randn(size, device=self.device).relu()
        self.seeds = torch.arange(options.batch, device=self.device)

    def autocast(self) -> torch.autocast:
        """The precision of all passes."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.low)

    def roll_out(self, steps: int) -> Episode:
        """Plays one episode as an actor does."""
        with torch.no_grad(), self.autocast():
            episode = ContextEpisode(self.networks, self.options, self.features)
            predictions, actions = [episode.predictions], []
            for _ in range(steps):
                actions.append(episode.choose(self.seeds).actions)
                predictions.append(episode.advance(actions[-1]))
        return Episode(torch.stack(predictions), torch.stack(actions))

    def pass_at_once(self, played: Episode) -> Played:
        """Passes all steps as the learner does."""
        with self.autocast():
            contexts = context_map(played.predictions[:-1], played.actions)
            return self.networks(self.features, played.predictions, contexts)

    def pass_by_step(self, played: Episode) -> Played:
        """Passes step after step, each through both networks; for plain first convolutions."""
        networks = self.networks
        assert networks.bias is not None
        assert networks.context is not None
        with self.autocast():
            base = networks.base(self.features)
            logits, actions, values = [base], [], []
            for step, prediction in enumerate(played.predictions):
                action, value = networks.context(networks.context.prepare(self.features), prediction)
                values.append(value)
                if step < len(played.actions):
                    actions.append(action)
                    context = context_map(prediction, played.actions[step])
                    logits.append(base + networks.bias(networks.bias.prepare(self.features), context))
        return Played(torch.stack(logits), torch.stack(actions), torch.stack(values))

    def descend(self, found: Played) -> None:
        """Passes backward from everything that the networks said."""
        assert found.action_logits is not None
        assert found.values is not None
        self.networks.zero_grad(set_to_none=True)
        sum(one.float().square().mean() for one in (found.logits, found.action_logits, found.values)).backward()  # type: ignore[union-attr]

    def seconds(self, work: Callable[[], object]) -> tuple[float, float]:
        """Returns how long work takes, in wall and CPU time."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - wall, time.process_time() - cpu

    def compare(
        self, name: str, kept: Callable[[], object], stepwise: Callable[[], object], repeats: int
    ) -> tuple[object, object]:
        """Prints the times of both ways and their ratio; returns what each gave."""

        def plainly() -> object:
            with plain(self.networks):
                return stepwise()

        results, work = [], []
        # What is counted is a first time, too, and not timed.
        for way in (kept, plainly):
            with FlopCounterMode(display=False) as counter:
                results.append(way())
            work.append(counter.get_total_flops() / 2e9)
        spent: tuple[list[tuple[float, float]], list[tuple[float, float]]] = ([], [])
        for turn in range(repeats):
            for place in (0, 1) if turn % 2 else (1, 0):
                spent[place].append(self.seconds((kept, plainly)[place]))
        (once, once_cpu), (each, each_cpu) = (
            [statistics.median(clock) for clock in zip(*way, strict=True)] for way in spent
        )
        cpu = f"{each_cpu / once_cpu:8.2f}" if self.device.type == "cpu" else 8 * " "
        print(
            f"  {name:36s} {1e3 * once:10.1f} {1e3 * each:10.1f} {each / once:8.2f} {cpu} "
            f"{work[0]:10.1f} {work[1]:8.1f} {work[1] / work[0]:8.2f}",
            flush=True,
        )
        return results[0], results[1]


def difference(found: Played, expected: Played) -> str:
    """Says how far logits and values are apart at most, and how large they are."""
    text = []
    for name in Played._fields:
        one, other = (getattr(played, name).detach().float() for played in (found, expected))
        text.append(
            f"{name.replace('_', ' ')} {(one - other).abs().max():.1e} (of up to {other.abs().max():.3g} in size)"
        )
    return ", ".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Times the kept part of the first convolutions against the plain form."
    )
    parser.add_argument("--features", type=int, default=4096, help="channels of X (default: 4096)")
    parser.add_argument("--width", type=int, default=512, help="channels of every layer (default: 512)")
    parser.add_argument("--encoded", type=int, default=256, help="channels of a branch of both encoders (default: 256)")
    parser.add_argument("--classes", type=int, default=150, help="N_c (default: 150)")
    parser.add_argument("--positions", type=int, default=30, help="rows and columns of X (default: 30)")
    parser.add_argument("--batch", type=int, default=1, help="images (default: 1)")
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 2], help="T of rollouts (default: 8 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default: 5)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="default: fp32")
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, {options.precision}")
    print(
        f"X {options.batch} × {options.features} × {options.positions} × {options.positions}, width {options.width}, branches of "
        f"{options.encoded}, {options.classes} classes; medians of {options.repeats} turns"
    )
    bench = Bench(options)
    names = f"{'ratio':>8s} {'CPU':>8s} {'once, GMAC':>10s} {'plain':>8s} {'ratio':>8s}"
    print(f"  {'':36s} {'once, ms':>10s} {'plain, ms':>10s} {names}")
    for steps in options.steps:
        found, expected = bench.compare(
            f"rollout, T = {steps}",
            lambda steps=steps: bench.roll_out(steps),  # type: ignore[misc]
            lambda steps=steps: bench.roll_out(steps),  # type: ignore[misc]
            options.repeats,
        )
        assert isinstance(found, Episode)
        assert isinstance(expected, Episode)
        turned = (found.predictions[-1] != expected.predictions[-1]).float().mean()
        print(f"    {100 * turned:.2f} % of the positions end with another class")
    episode = bench.roll_out(options.steps[0])
    with torch.no_grad():
        found, expected = bench.compare(
            f"learner's forward, T = {options.steps[0]}",
            lambda: bench.pass_at_once(episode),
            lambda: bench.pass_by_step(episode),
            options.repeats,
        )
    assert isinstance(found, Played)
    assert isinstance(expected, Played)
    bench.compare(
        f"learner's forward and backward, T = {options.steps[0]}",
        lambda: bench.descend(bench.pass_at_once(episode)),
        lambda: bench.descend(bench.pass_by_step(episode)),
        options.repeats,
    )
    print(f"  largest differences with the same contexts: {difference(found, expected)}")


if __name__ == "__main__":
    main()
