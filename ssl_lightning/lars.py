"""LARS and LARC as self-supervised methods use them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ssl_lightning.distributed import norms, shards


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) as self-supervised methods use it.

    Tensors of fewer than two dimensions (biases, norms) get neither weight decay nor rate scaling. Own code because
    timm's and lightly's versions differ from the papers' and wait on the device for every parameter; here the norms
    stay on the device and all tensors are updated in a handful of calls.

    Args:
        params: Parameters or groups of parameters.
        lr: Learning rate.
        weight_decay: Added to the gradient before the trust ratio.
        momentum: Momentum of the update.
        trust_coefficient: The trust ratio is this times norm(p) / norm(gradient + weight_decay * p); 1 where a norm
            is zero.
        lr_in_momentum: Whether the learning rate multiplies the update before it enters the momentum (SimCLR's code)
            or after (BYOL, MoCo v3, Barlow Twins, VICReg). Both are the same while the learning rate is constant.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
        lr_in_momentum: bool = False,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "weight_decay": weight_decay,
                "momentum": momentum,
                "trust_coefficient": trust_coefficient,
                "lr_in_momentum": lr_in_momentum,
            },
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        updates: list[Tensor] = [p.grad for p in params if p.grad is not None]
        adapted = [i for i, p in enumerate(params) if self._adapts(p)]
        if adapted:
            scaled = self._scaled([params[i] for i in adapted], [updates[i] for i in adapted], group)
            for i, gradient in zip(adapted, scaled, strict=True):
                updates[i] = gradient

        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        torch._foreach_mul_(buffers, group["momentum"])
        before, after = (group["lr"], 1.0) if group["lr_in_momentum"] else (1.0, group["lr"])
        torch._foreach_add_(buffers, updates, alpha=before)
        torch._foreach_add_(params, buffers, alpha=-after)

    def _adapts(self, param: Tensor) -> bool:
        return param.ndim > 1

    def _scaled(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Gradients with weight decay, times the trust ratio."""
        gradients = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
        weight_norms, gradient_norms = norms(weights), norms(gradients)
        ratios = group["trust_coefficient"] * weight_norms / gradient_norms
        ratios = torch.where((weight_norms > 0) & (gradient_norms > 0), ratios, 1.0)
        torch._foreach_mul_(shards(gradients), list(ratios.unbind()))
        return gradients


class LARC(LARS):
    """LARS as SwAV uses it (NVIDIA apex's LARC without clipping): nothing is excluded.

    The trust ratio divides by norm(gradient) + weight_decay * norm(p), the sum of the norms. If either norm is zero,
    the tensor gets its plain gradient without decay.

    Args:
        params: Parameters or groups of parameters.
        lr: Learning rate.
        weight_decay: Added to the gradient after the trust ratio is taken.
        momentum: Momentum of the update.
        trust_coefficient: As for LARS.
        lr_in_momentum: As for LARS.
    """

    def _adapts(self, param: Tensor) -> bool:
        return True

    def _scaled(self, weights: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        weight_norms, gradient_norms = norms(weights), norms(gradients)
        adapted = (weight_norms > 0) & (gradient_norms > 0)
        divisors = gradient_norms + group["weight_decay"] * weight_norms + 1e-8
        ratios = torch.where(adapted, group["trust_coefficient"] * weight_norms / divisors, 1.0)
        decayed = list(torch._foreach_mul(weights, group["weight_decay"]))
        torch._foreach_mul_(shards(decayed), list(adapted.to(ratios.dtype).unbind()))
        torch._foreach_add_(decayed, gradients)
        torch._foreach_mul_(shards(decayed), list(ratios.unbind()))
        return decayed
