"""The transform of Meta-Curvature."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fastkfo.optim.transforms.parameter_shape import check_parameter


class MetaCurvatureTransform(nn.Module):
    """One learned matrix per axis of a gradient.

    With G a vector: `mc ∘ G`. With G `[n, m]`: `mc_in G mc_out`. With G `[n_in, n_out, *kernel]`
    and the kernel as one axis: `Σ mc_in[a, a'] mc_out[b', b] mc_f[f, f'] G[a', b', f']`. (A
    convolution's weight has its output channels first; "in" is the first axis all the same.)

    Args:
        param: the parameter whose gradient is transformed; it gives shape, dtype and device.
        lr: a factor of the result.

    Raises:
        TypeError: `param` is not a floating-point tensor.
        NotImplementedError: `param` has no axis.

    Source: Park, Oliva, "Meta-Curvature", NeurIPS 2019.
    """

    def __init__(self, param: Tensor, lr: float = 1.0) -> None:
        super().__init__()
        check_parameter(param)
        self.lr = lr
        shape = param.shape
        self.dim = len(shape)

        def eye(size: int) -> nn.Parameter:
            return nn.Parameter(torch.eye(size, dtype=param.dtype, device=param.device))

        if self.dim == 0:
            raise NotImplementedError(
                "param: MetaCurvatureTransform expects one axis or more, got []"
            )
        if self.dim == 1:
            self.mc = nn.Parameter(torch.ones_like(param))
        elif self.dim == 2:
            self.mc_in, self.mc_out = eye(shape[0]), eye(shape[1])
        else:
            self.n_in, self.n_out = shape[0], shape[1]
            self.n_f = math.prod(shape[2:])
            self.mc_in, self.mc_out, self.mc_f = eye(self.n_in), eye(self.n_out), eye(self.n_f)

    def forward(self, grad: Tensor) -> Tensor:
        """Transform a gradient of the parameter's shape."""
        if self.dim == 1:
            return self.lr * (self.mc * grad)
        if self.dim == 2:
            return self.lr * (self.mc_in @ grad @ self.mc_out)
        update = self.mc_out.t() @ grad.reshape(self.n_in, self.n_out, self.n_f) @ self.mc_f.t()
        update = self.mc_in @ update.reshape(self.n_in, -1)
        return self.lr * update.reshape(grad.shape)
