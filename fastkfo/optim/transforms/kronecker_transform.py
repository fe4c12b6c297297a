"""Kronecker-factored transforms of gradients, the meta-optimizer of Meta-KFO."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from fastkfo.optim.transforms.module_transform import ReshapedTransform
from fastkfo.optim.transforms.parameter_shape import check_parameter, matrix_shape


class KroneckerTransform:
    """Makes transforms `U = L G R + β` of a gradient seen as matrices G `[-1, n, m]`.

    A weight `[n, m]` is one matrix, a vector `[n]` is n × 1, and a convolution's weight
    `[out, in, *kernel]` is `out` matrices of `in` rows and `prod(kernel)` columns.

    Args:
        kronecker_cls: called as `kronecker_cls(n=n, m=m, bias=bias, psd=psd)`: `KroneckerLinear`,
            or `KroneckerNetwork` for a non-linear transform.
        bias: whether the transform has a β `[n, m]`.
        psd: whether the factors enter as `LᵀL` and `RᵀR`, positive semi-definite.

    Source: Arnold, Iqbal, Sha, "When MAML Can Adapt Fast and How to Assist When It Cannot",
    AISTATS 2021.
    """

    def __init__(
        self, kronecker_cls: Callable[..., nn.Module], bias: bool = False, psd: bool = True
    ) -> None:
        self.kronecker_cls = kronecker_cls
        self.bias = bias
        self.psd = psd

    def __call__(self, param: Tensor) -> ReshapedTransform:
        """The transform for one parameter, in its dtype and on its device.

        Args:
            param: the parameter.

        Returns:
            The transform.

        Raises:
            TypeError: `param` is not a floating-point tensor.
        """
        check_parameter(param)
        n, m = matrix_shape(param)
        transform = self.kronecker_cls(n=n, m=m, bias=self.bias, psd=self.psd)
        return ReshapedTransform(
            transform=transform.to(param.device, param.dtype), shape=(-1, n, m)
        )
