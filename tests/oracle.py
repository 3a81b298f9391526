"""What the methods are held against: whole training steps, with optimizers, heads and teachers, written down plainly.

``compare`` trains a method next to its restatement, which a test gives as a function of weights and views.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssl_lightning import SSLModule

Weights = dict[str, Tensor]
Update = Callable[[str, Tensor, Tensor, dict[str, Any]], Tensor]


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def run(module: nn.Module, weights: Weights, prefix: str, x: Tensor) -> Tensor:
    """A module's forward with the weights of that prefix; BatchNorm sees the batch and keeps nothing."""
    own = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    own |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    return torch.func.functional_call(module, own, x)


def linear(x: Tensor, weights: Weights, name: str) -> Tensor:
    out = x @ weights[f"{name}.weight"].T
    return out + weights[f"{name}.bias"] if f"{name}.bias" in weights else out


def batch_norm(x: Tensor, weights: Weights, name: str) -> Tensor:
    out = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()
    return out * weights.get(f"{name}.weight", 1) + weights.get(f"{name}.bias", 0)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def sgd(lr: float, decay: float) -> Update:
    def update(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        state[name] = 0.9 * state.get(name, 0) + gradient + decay * p
        return p - lr * state[name]

    return update


def lars(lr: float, decay: float) -> Update:
    def update(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        if p.ndim > 1:
            gradient = gradient + decay * p
            gradient = gradient * (0.001 * p.norm() / gradient.norm() if p.norm() * gradient.norm() > 0 else 1)
        state[name] = 0.9 * state.get(name, 0) + gradient
        return p - lr * state[name]

    return update


def lars_simclr(lrs: Sequence[float], decay: float) -> Update:
    """LARS of SimCLR's code: the learning rate multiplies what enters the velocity, not what leaves it."""

    def update(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        step, velocity = state.get(name, (0, 0))
        if p.ndim > 1:
            gradient = gradient + decay * p
            gradient = gradient * (0.001 * p.norm() / gradient.norm() if p.norm() * gradient.norm() > 0 else 1)
        velocity = 0.9 * velocity + lrs[step] * gradient
        state[name] = (step + 1, velocity)
        return p - velocity

    return update


def larc(lr: float, decay: float) -> Update:
    def update(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        if p.norm() > 0 and gradient.norm() > 0:
            ratio = 0.001 * p.norm() / (gradient.norm() + decay * p.norm() + 1e-8)
            gradient = ratio * (gradient + decay * p)
        state[name] = 0.9 * state.get(name, 0) + gradient
        return p - lr * state[name]

    return update


def adamw(lr: float, decay: float, beta1: float = 0.9, beta2: float = 0.999, undecayed: tuple[str, ...] = ()) -> Update:
    def update(name: str, p: Tensor, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        step, first, second = state.get(name, (0, 0, 0))
        step, first = step + 1, beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        state[name] = (step, first, second)
        p = p * (1 - lr * decay) if p.ndim > 1 and name not in undecayed else p
        return p - lr * first / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + 1e-8)

    return update


def moved(weights: Weights, momentum: float) -> None:
    """Every teacher follows the student of the same name."""
    for name in list(weights):
        if name.startswith("teacher_"):
            weights[name] = momentum * weights[name] + (1 - momentum) * weights[name.removeprefix("teacher_")]


def compare(
    method: SSLModule,
    loss_of: Callable[[Weights, list[Tensor]], Tensor],
    update: Update,
    batches: Iterable[list[Tensor]],
    before: Callable[[Weights], None] = lambda _: None,
    clip: Callable[[], None] = lambda: None,
    gradients_of: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda gradients: gradients,
    after: Callable[[Weights], None] = lambda _: None,
    lrs: Sequence[float] | None = None,
    atol: float = 1e-6,
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Train the method and its restatement side by side; losses and all parameters must agree.

    The method must be in float64; its learning rate is for a batch of 256, or given for each step by ``lrs``.
    """
    optimizer = optimizer or method.optim.create(method, 256)
    weights: Weights = {name: p.detach().clone() for name, p in method.named_parameters()}
    trained = [name for name, p in method.named_parameters() if p.requires_grad]
    state: dict[str, Any] = {}
    for step, views in enumerate(batches):
        for group in optimizer.param_groups if lrs else ():
            group["lr"] = lrs[step]
        loss = method.training_loss(views)
        optimizer.zero_grad()
        loss.backward()
        clip()
        optimizer.step()
        method.update_teacher()

        before(weights)
        weights |= {name: weights[name].detach().requires_grad_() for name in trained}
        expected = loss_of(weights, views)
        gradients = torch.autograd.grad(expected, [weights[name] for name in trained])
        torch.testing.assert_close(loss, expected, atol=1e-9, rtol=1e-11)
        weights = {name: value.detach() for name, value in weights.items()}
        for name, gradient in gradients_of(dict(zip(trained, gradients, strict=True))).items():
            weights[name] = update(name, weights[name], gradient, state)
        after(weights)
    for name, p in method.named_parameters():
        torch.testing.assert_close(p.detach(), weights[name], atol=atol, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def random_views(steps: int, *sizes: int, batch: int = 4) -> Iterable[list[Tensor]]:
    return [[torch.rand(batch, 3, size, size, dtype=torch.float64) for size in sizes] for _ in range(steps)]


def relu_mlp(x: Tensor, weights: Weights, name: str, norms: tuple[int, ...]) -> Tensor:
    """Linear layers 0, 3, 6, ... of an ``nn.Sequential`` with BatchNorm at ``norms`` and ReLU between."""
    layers = sorted(
        {int(key.split(".")[1]) for key in weights if key.startswith(f"{name}.") and weights[key].ndim == 2}
    )
    for layer in layers:
        x = linear(x, weights, f"{name}.{layer}")
        if layer + 1 in norms:
            x = batch_norm(x, weights, f"{name}.{layer + 1}")
        x = F.relu(x) if layer != layers[-1] else x
    return x
