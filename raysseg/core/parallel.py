"""Several learners as one: each passes its own rows of a minibatch, and the result is that of one learner with all rows.

What makes it so, and where learners wait for each other:

    made ready     every learner says whether its rows could be read                                        (agree)
    denominators   labelled pixels, weights: summed before the pass                                         (sum)
    normalisation  statistics of the whole minibatch in every layer, forward and backward                   (wrap)
    dropout        drawn for the whole minibatch from one seed, of which each takes its rows                (passing)
    gradients      averaged while the backward pass still runs: DistributedDataParallel                     (wrap)
    losses         summed at the end of the work; who finds one that is not finite, finds it with all others (sum)

A loss is (sum over own rows) / (denominator of the whole minibatch) × `scale`, as gradients are averaged and not summed. A
minibatch with fewer rows than there are learners goes whole to each of them; nothing is summed for it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.overrides import TorchFunctionMode

from raysseg.core.work import Share

T = TypeVar("T")


class Learners:
    """This learner's place among all that share the work; with one learner nothing is exchanged and nothing wrapped.

    Args:
        distributed: there are several, and torch's process group of them stands.
        device: where this learner's networks are.
    """

    def __init__(self, *, distributed: bool, device: torch.device) -> None:
        self.world = dist.get_world_size() if distributed else 1
        self.synchronises = False
        self._device = device
        self._gpu_layers: list[nn.SyncBatchNorm] = []
        # What is said in Python objects goes over the CPU, so that no GPU has to be waited for.
        over_gpu = distributed and dist.get_backend() == "nccl"
        self._control = dist.new_group(backend="gloo") if over_gpu else None
        self._alone = [dist.new_group([rank]) for rank in range(self.world)][dist.get_rank()] if over_gpu else None

    def wrap(self, network: nn.Module, *, in_parts: bool = False) -> nn.Module:
        """Returns the network as it is to be called where it is trained.

        With several learners its normalisation layers are replaced in place by synchronised ones (the same parameters,
        buffers and names), and what is returned averages gradients over the learners.

        Args:
            network: to be trained.
            in_parts: whether updates may leave some of its parameters out.
        """
        if self.world == 1:
            return network
        if self._device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(network)
            self._gpu_layers += [layer for layer in network.modules() if isinstance(layer, nn.SyncBatchNorm)]
        else:
            synchronise_normalisation(network, self)
        with warnings.catch_warnings():
            # The name that follows it does not exist in every torch that raysseg runs on.
            warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated", category=FutureWarning)
            return DistributedDataParallel(
                network, broadcast_buffers=False, gradient_as_bucket_view=True, find_unused_parameters=in_parts
            )

    def scale(self, share: Share) -> int:
        """Returns the factor on a loss that undoes the averaging of gradients: the number of learners that split it."""
        return self.world if share.is_split else 1

    def sum(self, values: torch.Tensor, share: Share | None = None) -> torch.Tensor:
        """Returns values `[...]` summed over the learners, in place.

        Args:
            values: this learner's part of them.
            share: of the minibatch that they belong to; where it is not split, they are complete already.
        """
        if self.world > 1 and (share is None or share.is_split):
            dist.all_reduce(values)
        return values

    def gather(self, value: T) -> list[T]:
        """Returns the values of all learners, in their order; for what is rare and not large."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self._control)
        return values

    def agree(self, function: Callable[[], T]) -> T:
        """Calls a function that may fail on one learner alone; where it does, it fails on all of them.

        Raises:
            Exception: what the function raised, or what it raised on the first of the others where it did.
        """
        if self.world == 1:
            return function()
        result: Any = None
        error: Exception | None = None
        try:
            result = function()
        except Exception as own:
            error = own
        failures = torch.tensor([float(error is not None)])
        dist.all_reduce(failures, group=self._control)
        if failures.item():
            others = [found for found in self.gather(error) if found is not None]
            raise error if error is not None else others[0]
        return result

    @contextlib.contextmanager
    def passing(self, network: nn.Module, piece: Share, *, last: bool) -> Iterator[None]:
        """Everything that a forward and a backward pass of one piece of a minibatch needs.

        Args:
            network: from `wrap`.
            piece: which rows pass.
            last: of the minibatch's pieces; gradients are exchanged with the last one alone.
        """
        self._synchronise(piece.is_split)
        with contextlib.ExitStack() as stack:
            if isinstance(network, DistributedDataParallel) and not last:
                stack.enter_context(network.no_sync())
            yield

    def _synchronise(self, on: bool) -> None:
        """Switches normalisation between the statistics of all learners and its own."""
        self.synchronises = on and self.world > 1
        for layer in self._gpu_layers:
            layer.process_group = None if self.synchronises else self._alone


class RowsOfBatch(TorchFunctionMode):
    """Draws random numbers of a forward pass for the whole minibatch and takes the rows of a share.

    Whoever passes the minibatch in parts, each from the same seed, gets the numbers that one pass of all rows would draw
    (dropout of any form, stochastic depth). Tensors may hold several consecutive rows per image.

    Args:
        share: the rows that pass.

    Raises:
        ValueError: while passing, where random numbers are drawn that do not belong to rows of the minibatch.
    """

    def __init__(self, share: Share) -> None:
        super().__init__()
        self._share = share

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Passes every call on; draws are made for the whole minibatch."""
        kwargs = kwargs or {}
        if func in _DROPOUTS:
            return self._dropout(func, *args, **kwargs)
        if func is torch.Tensor.bernoulli_:
            target = args[0]
            return target.copy_(
                self._rows(lambda shape: func(target.new_empty(shape), *args[1:], **kwargs), target.shape)
            )
        if func is torch.rand:
            shape = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            return self._rows(lambda whole: func(whole, **kwargs), torch.Size(shape))
        return func(*args, **kwargs)

    def _dropout(
        self,
        func: Callable[..., Any],
        input: torch.Tensor,
        p: float = 0.5,
        training: bool = True,
        inplace: bool = False,
    ) -> torch.Tensor:
        if not training or p == 0.0:
            return func(input, p, training, inplace)
        mask = self._rows(lambda shape: func(input.new_ones(shape), p, True, False), input.shape)
        return input.mul_(mask) if inplace else input * mask

    def _rows(self, draw: Callable[[torch.Size], torch.Tensor], shape: torch.Size) -> torch.Tensor:
        share = self._share
        each, rest = divmod(shape[0], share.count) if shape else (0, 1)
        if rest:
            raise ValueError(f"Random numbers of the shape {list(shape)} do not belong to {share.count} images.")
        return draw(torch.Size((each * share.total, *shape[1:])))[each * share.start : each * share.stop]


_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)


class SynchronisedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch normalisation by the statistics of all learners' rows, on the CPU, where torch's own refuses to work.

    Parameters, buffers, their names and evaluation are those of `nn.BatchNorm2d`.

    Args:
        layer: the layer that it stands in for; parameters and buffers are the same tensors.
        learners: says whether the minibatch that passes is split.
    """

    def __init__(self, layer: nn.modules.batchnorm._BatchNorm, learners: Learners) -> None:
        super().__init__(layer.num_features, layer.eps, layer.momentum, layer.affine, layer.track_running_stats)
        self._parameters = layer._parameters
        self._buffers = layer._buffers
        self.training = layer.training
        self._learners = learners

    def _check_input_dim(self, input: torch.Tensor) -> None:
        if input.ndim < 2:
            raise ValueError(f"expected at least 2 dimensions, got {input.ndim}")

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalises `[B, C, ...]`; in training by mean and variance over B and ... of all learners."""
        if not (self.training and self._learners.synchronises):
            return super().forward(input)
        output, mean, variance, count = _Normalise.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * (count / (count - 1)), momentum)
        return output


def synchronise_normalisation(network: nn.Module, learners: Learners) -> None:
    """Replaces every batch normalisation inside a network by a synchronised one, in place. Source: design."""
    for name, child in list(network.named_children()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(network, name, SynchronisedBatchNorm(child, learners))
        else:
            synchronise_normalisation(child, learners)


class _Normalise(torch.autograd.Function):
    """Normalises `[B, C, ...]` by the statistics over all learners; both directions exchange two numbers per channel."""

    @staticmethod
    def forward(
        ctx: Any, input: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, variance = (value.float() for value in torch.batch_norm_update_stats(input, None, None, 0.0))
        count = torch.full_like(mean[:1], input.numel() / input.shape[1])
        own = torch.cat([mean, variance, count])
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        # Deviations are added around the common mean: sums of squares would cancel.
        means, variances, counts = torch.stack(everyone).split([len(mean), len(mean), 1], dim=1)
        shares = counts / counts.sum()
        mean, total = (means * shares).sum(0), counts.sum()
        variance = ((variances + (means - mean).square()) * shares).sum(0)
        ctx.save_for_backward(input, weight, mean, variance, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, total)
        return F.batch_norm(input, mean, variance, weight, bias, False, 0.0, eps), mean, variance, total

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient = gradients[0].contiguous()
        input, weight, mean, variance, total = ctx.saved_tensors
        through, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, input, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
        )
        sums = torch.cat([for_bias, for_weight]).float()
        dist.all_reduce(sums)
        mean_gradient, mean_product = (sums / total).chunk(2)
        inverse = (variance + ctx.eps).rsqrt()
        factor = inverse if weight is None else inverse * weight
        # The statistics depend on every row: d input = through − factor · (mean(g) + x̂ · mean(g x̂)).
        slope = -factor * inverse * mean_product
        offset = -factor * mean_gradient - slope * mean
        shape = (1, -1, *[1] * (input.ndim - 2))
        through = torch.addcmul(through + offset.view(shape), input, slope.view(shape)).to(input.dtype)
        return through, None if weight is None else for_weight, None if weight is None else for_bias, None
