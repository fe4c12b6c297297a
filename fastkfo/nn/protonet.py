"""Nearest-prototype classification.

Source: Snell, Swersky, Zemel, "Prototypical Networks for Few-shot Learning", NeurIPS 2017; the
interface is learn2learn 0.2.0's `nn.protonet` (https://github.com/learnables/learn2learn).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["PrototypicalClassifier", "compute_prototypes"]

EPS = 1e-8


def compute_prototypes(support: Tensor, labels: Tensor) -> Tensor:
    """Average the embeddings of each class: p_c = mean of support[labels == c].

    Args:
        support: Embeddings, `[N, ...]`, floating.
        labels: Class of each, `[N]`, any integers.

    Returns:
        Prototypes `[C, ...]`, classes in ascending order of label, differentiable.

    Raises:
        TypeError: If `support` is not floating.
        ValueError: If `labels` is not one label for each embedding, or there is none.
    """
    if not support.is_floating_point():
        raise TypeError(f"support: expected a floating dtype, got {support.dtype}")
    if labels.shape != support.shape[:1] or labels.numel() == 0:
        raise ValueError(
            f"labels: expected shape [N] with N >= 1 for support {tuple(support.shape)}, "
            f"got {tuple(labels.shape)}"
        )
    return torch.stack([support[labels == c].mean(dim=0) for c in torch.unique(labels)])


class PrototypicalClassifier(nn.Module):
    """Score queries by their distance to class prototypes: logits = -d(p_c, x).

    Args:
        support: Support embeddings `[N, D]`; with `labels`, they are fitted at once.
        labels: Their classes `[N]`.
        distance: "euclidean" (squared), "cosine", or a callable `(prototypes [C, D], x [Q, D])`
            -> distances `[Q, C]`.
        normalize: Whether prototypes and queries are scaled to unit length; always so for "cosine".

    Attributes:
        prototypes: `[C, D]` after a fit, else None. As in learn2learn, they are no buffer: not in
            the state dict, and they stay in the graph of the support.

    Raises:
        TypeError: If `distance` is neither a string nor callable.
        ValueError: If `distance` is an unknown string, or only one of `support`, `labels` is given.

    Source: Snell et al. 2017; learn2learn 0.2.0, `nn.PrototypicalClassifier`.
    """

    def __init__(
        self,
        support: Tensor | None = None,
        labels: Tensor | None = None,
        distance: str | Callable[[Tensor, Tensor], Tensor] = "euclidean",
        normalize: bool = False,
    ) -> None:
        super().__init__()
        # The instance attribute hides the static method of the same name, as in learn2learn.
        self.normalize = normalize or distance == "cosine"  # type: ignore[assignment, method-assign]
        self.distance: Callable[[Tensor, Tensor], Tensor]
        if distance == "euclidean":
            self.distance = self.euclidean_distance
        elif distance == "cosine":
            self.distance = self.cosine_distance
        elif isinstance(distance, str):
            raise ValueError(f"distance: expected 'euclidean' or 'cosine', got {distance!r}")
        elif callable(distance):
            self.distance = distance
        else:
            raise TypeError(
                f"distance: expected a string or a callable, got {type(distance).__name__}"
            )
        self._compute_prototypes = compute_prototypes
        self.prototypes: Tensor | None = None
        if (support is None) != (labels is None):
            missing = "labels" if labels is None else "support"
            raise ValueError(f"{missing}: expected support and labels together, got None")
        if support is not None and labels is not None:
            self.fit_(support, labels)

    def fit_(self, support: Tensor, labels: Tensor) -> Tensor:
        """Compute the prototypes and keep them.

        Args:
            support: Support embeddings `[N, D]`.
            labels: Their classes `[N]`.

        Returns:
            The prototypes `[C, D]`.

        Raises:
            TypeError: If `support` is not floating.
            ValueError: If `labels` is not one label for each embedding, or there is none.
        """
        prototypes = self._compute_prototypes(support, labels)
        if bool(self.normalize):
            prototypes = PrototypicalClassifier.normalize(prototypes)
        self.prototypes = prototypes
        return prototypes

    @staticmethod
    def cosine_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """Compute -⟨q, p⟩ for prototypes `[C, D]`, queries `[Q, D]`, both of unit length."""
        return -torch.mm(queries, prototypes.t())

    @staticmethod
    def euclidean_distance(prototypes: Tensor, queries: Tensor) -> Tensor:
        """Compute ‖q - p‖² for prototypes `[C, D]` and queries `[Q, D]`: `[Q, C]`."""
        return (prototypes.unsqueeze(0) - queries.unsqueeze(1)).pow(2).sum(dim=2)

    @staticmethod
    def normalize(x: Tensor, epsilon: float = EPS) -> Tensor:
        """Compute x / (‖x‖ + ε) for each row of `[N, D]`."""
        return x / (x.norm(p=2, dim=1, keepdim=True) + epsilon)

    def forward(self, x: Tensor) -> Tensor:
        """Score queries.

        Args:
            x: Query embeddings `[Q, D]`.

        Returns:
            Logits `[Q, C]`.

        Raises:
            RuntimeError: If no prototypes were fitted.
            ValueError: If `x` does not have the prototypes' number of features.
        """
        if self.prototypes is None:
            raise RuntimeError("no prototypes yet: call fit_(support, labels) first")
        features = self.prototypes.size(-1)
        if x.dim() != 2 or x.size(1) != features:
            raise ValueError(f"x: expected shape [Q, {features}], got {tuple(x.shape)}")
        if bool(self.normalize):
            x = PrototypicalClassifier.normalize(x)
        return -self.distance(self.prototypes, x)
