"""The head of a classifier, the linear layers at its end: found in any module on probe inputs, and proven there."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fl_lightning.errors import SettingError

PROBES = 2
"""Random images on which a model is tried; BatchNorm needs two."""
TOLERANCE = 1e-4
"""Relative to the largest output: float32 sums in another order differ less, another activation differs more."""


class HeadError(SettingError):
    """A module has no head of linear layers where one is needed, or another than was named."""


@dataclass(frozen=True)
class HeadSpec:
    """The linear layers at the end of a module, with a ReLU between each two; dropouts between do nothing here.

    Attributes:
        layers: the module's names of the linear layers, in the order in which they are computed.
        num_classes: number of logits.
    """

    layers: tuple[str, ...]
    num_classes: int

    @staticmethod
    @torch.no_grad()
    def find(module: nn.Module, inputs: Tensor, head: str = "auto") -> "HeadSpec":
        """Find the longest head, or a named one, and prove it by replaying it on features that no image has.

        Logits count up to a constant for each image, which the cross entropy does not see; so a module may end in a
        log-softmax. The module is left in eval mode.

        Args:
            module: (N, C, H, W) -> (N, num_classes) logits.
            inputs: (N, C, H, W) probe inputs as the module takes them, e.g. random and N = 2.
            head: `auto`, or the module's name of a linear layer or of a container, to which the head is limited.

        Raises:
            HeadError: the logits are not those of a linear layer, `head` is not at the end of the module, or the logits
                depend on the inputs in another way than through the head's first layer.
        """
        module.eval()
        with _linear_calls(module) as calls:
            logits = module(inputs)
        name = type(module).__name__
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(inputs):
            shape = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
            raise HeadError(
                f"{name} returns {shape} for {len(inputs)} images, but logits of shape ({len(inputs)}, classes) are "
                "needed. Wrap it in a module that returns these alone."
            )
        chain = _chain(calls, logits)
        if not chain:
            raise HeadError(
                f"{name} does not end in a linear layer: its outputs are those of none of its "
                f"{len(calls)} calls of nn.Linear. The closed form needs logits, without a softmax; return them, or "
                "end the model in nn.Linear."
            )
        spec = HeadSpec(_limited(chain, module, head), logits.shape[1])
        features = torch.randn_like(chain[-len(spec.layers)].inputs)
        with _features_replaced(module.get_submodule(spec.layers[0]), features):
            expected = module(inputs)
        if not same_logits(replay([module.get_submodule(layer) for layer in spec.layers], features), expected):
            raise HeadError(
                f"{name} computes other logits from the inputs of '{spec.layers[0]}' than its linear layers "
                f"{', '.join(spec.layers)} with a ReLU between each two, as with another activation "
                "or a connection past them. Name a later layer as `head`."
            )
        return spec


class _Call(NamedTuple):
    """One call of a linear layer."""

    name: str
    inputs: Tensor
    outputs: Tensor


@contextmanager
def _linear_calls(module: nn.Module) -> Iterator[list[_Call]]:
    """Collect the calls of the module's linear layers, in their order."""
    calls: list[_Call] = []

    def collect(name: str) -> Any:
        return lambda _, inputs, outputs: calls.append(_Call(name, inputs[0], outputs))

    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    handles = [layer.register_forward_hook(collect(name)) for name, layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _features_replaced(layer: nn.Module, features: Tensor) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(lambda *_: (features,))
    try:
        yield
    finally:
        handle.remove()


def _chain(calls: list[_Call], logits: Tensor) -> list[_Call]:
    """The calls that lead to the logits with a ReLU between each two, in their order, each of a layer called once."""
    times = Counter(call.name for call in calls)
    once = [call for call in calls if times[call.name] == 1 and call.inputs.ndim == 2]
    last = next((call for call in reversed(once) if same_logits(call.outputs, logits)), None)
    chain: list[_Call] = []
    while last:
        chain.insert(0, last)
        wanted = last.inputs
        # zeros would be the ReLU of anything
        last = next((c for c in reversed(once) if wanted.any() and same(c.outputs.relu(), wanted)), None)
    return chain


def _limited(chain: list[_Call], module: nn.Module, head: str) -> tuple[str, ...]:
    """Names of the layers of a chain that `head` names."""
    names = tuple(call.name for call in chain)
    if head == "auto":
        return names
    named = tuple(name for name in names if name == head or name.startswith(f"{head}."))
    if not named or named[-1] != names[-1]:
        raise HeadError(
            f"`head` names '{head}', but the linear layers at the end of {type(module).__name__} are "
            f"{', '.join(names)}. Name the last of them, a container of it, or `auto`."
        )
    return named


def replay(linear: Sequence[nn.Linear], features: Tensor) -> Tensor:
    """(N, D) features -> (N, num_classes) logits by linear layers with a ReLU between each two, and nothing else."""
    x = features
    for layer in linear:
        x = F.linear(x if layer is linear[0] else x.relu(), layer.weight, layer.bias)
    return x


def same(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to float32 rounding."""
    if found.shape != expected.shape:
        return False
    scale = expected.abs().max().item()
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True)


def same_logits(found: Tensor, expected: Tensor) -> bool:
    """Whether two tensors are equal up to float32 rounding and, for each image, a constant."""
    if found.shape != expected.shape:
        return False
    scale = max(found.abs().max().item(), expected.abs().max().item())
    found, expected = found.log_softmax(1), expected.log_softmax(1)
    return torch.allclose(found, expected, rtol=0, atol=TOLERANCE * scale, equal_nan=True)


class Trunk(nn.Module):
    """Everything of a module before its head, as a module of its own: (N, C, H, W) inputs -> inputs of the head.

    Args:
        module: is run up to the head; its parameters are called `module.<name>` here.
        first: the module's name of the head's first linear layer.
    """

    def __init__(self, module: nn.Module, first: str) -> None:
        super().__init__()
        self.module = module
        self.first = first

    def forward(self, inputs: Tensor) -> Tensor:
        def leave(layer: nn.Module, layer_inputs: tuple[Tensor]) -> None:
            raise _HeadReached(layer_inputs[0])

        handle = self.module.get_submodule(self.first).register_forward_pre_hook(leave)
        try:
            with _ReshapeWhereViewCannot():
                self.module(inputs)
        except _HeadReached as reached:
            return reached.args[0]
        finally:
            handle.remove()
        raise HeadError(f"{type(self.module).__name__} did not reach '{self.first}' on these images. Name its `head`.")


class _HeadReached(BaseException):
    """Not an error: the inputs of the head are known. A module's own `except Exception` must not catch it."""


class _ReshapeWhereViewCannot(TorchFunctionMode):
    """`view`, with which modules flatten their maps, also for maps in another memory layout than theirs."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError:
            if func is not Tensor.view:
                raise
            return Tensor.reshape(*args, **(kwargs or {}))
