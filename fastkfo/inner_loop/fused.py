"""An inner loop as one native call: `backend="fused"`.

What is known exactly is fused: chains of linear layers, activations and norms (known_models.py);
plain, scaled and Kronecker-factored steps (known_steps.py); softmax cross-entropy and mean squares.
Everything else keeps its reason, in words.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkfo.functional.cross_entropy import check_range
from fastkfo.functional.inner_loop_autograd import run
from fastkfo.functional.inner_loop_spec import InnerLoopResult, Spec, flattened
from fastkfo.inner_loop.buffers import TaskBuffers
from fastkfo.inner_loop.inputs import Batch
from fastkfo.inner_loop.known_models import Unfusable, read_model
from fastkfo.inner_loop.known_steps import read_step
from fastkfo.inner_loop.loss import PerTask
from fastkfo.inner_loop.model import shell_of
from fastkfo.inner_loop.run import Outcome
from fastkfo.inner_loop.step import Rule
from fastkfo.kernels import selector
from fastkfo.optim.inner import PerStepLR
from fastkfo.reference.inner_loop import LOSSES


def read_loss(name: str, loss: Any) -> int:
    """A loss's place in `LOSSES`.

    Args:
        name: the argument that it was given as.
        loss: the loss.

    Returns:
        The place.

    Raises:
        Unfusable: it is another one.
    """
    known = loss.fused_name() if isinstance(loss, PerTask) else None
    if known is None:
        raise Unfusable(f"{name} is neither F.cross_entropy nor F.mse_loss")
    return LOSSES.index(known)


def _check_inner(rule: Rule) -> None:
    """Raise Unfusable where steps are more than a transform and one rate."""
    if rule.inner.optimizer is not None:
        raise Unfusable(f"inner_optimizer is {rule.inner.optimizer}")
    if rule.inner.clips:
        raise Unfusable("gradients are clipped")
    if isinstance(rule.lr, PerStepLR):
        raise Unfusable("lr has a rate for every step")


class Fused:
    """An inner loop as one native call.

    Args:
        rule: how the learner adapts.
        loss: of the support.
        query_loss: of the query.

    Raises:
        Unfusable: it is not.
    """

    def __init__(self, rule: Rule, loss: Any, query_loss: Any) -> None:
        self.rule = rule
        _check_inner(rule)
        self.losses = (read_loss("loss", loss), read_loss("query_loss", query_loss))
        self.labels = [LOSSES[k].startswith("cross_entropy") for k in self.losses]
        self.model = read_model(rule.module)
        dtypes = {p.dtype for p in self.model.theta}
        devices = {p.device for p in self.model.theta}
        if len(dtypes) > 1 or len(devices) > 1 or not dtypes <= {torch.float32, torch.float64}:
            raise Unfusable("the parameters are not all float32 or all float64 on one device")
        self.device, self.dtype = devices.pop(), dtypes.pop()
        if selector.select("auto", self.device, "inner_loop") != "native":
            why = selector.unavailable("native", str(self.device), "inner_loop")
            raise Unfusable(f"there is no kernel for {self.device.type}: {why or 'not chosen'}")
        self.features = self.model.layers[0].in_features
        self.classes = self.model.layers[-1].out_features
        self.least = 2 if any([x.kind == "batch_norm" for x in self.model.layers]) else 1
        self._read_step()

    def _read_step(self) -> None:
        model, step = self.model, read_step(self.rule, self.model.theta)
        groups = (model.theta, step.left, step.right, step.bias, step.scale)
        self.present, self.flat = flattened(groups)
        self.step = step
        self._specs: dict[tuple[int, bool], Spec] = {}

    def inputs(self, batch: Batch) -> Batch:
        """The batch in the form that the call takes.

        Args:
            batch: the tasks.

        Returns:
            The batch.

        Raises:
            Unfusable: it has another one.
        """
        x_s, y_s, x_q, y_q = batch
        x_s = self._features("x_s", x_s)
        x_q = None if x_q is None else self._features("x_q", x_q)
        self._check_targets("y_s", y_s, x_s, self.labels[0])
        if y_q is not None:
            assert x_q is not None
            self._check_targets("y_q", y_q, x_q, self.labels[1])
        return Batch(x_s, y_s, x_q, y_q)

    def _features(self, name: str, x: Any) -> Tensor:
        if not isinstance(x, Tensor):
            raise Unfusable(f"{name} is not one tensor")
        if x.dtype != self.dtype or x.device != self.device:
            raise Unfusable(f"{name} is not {self.dtype} on {self.device}")
        if self.model.flat:
            x = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
        if x.dim() != 3 or x.shape[2] != self.features or x.shape[1] < self.least:
            raise Unfusable(
                f"{name} is not [T, S, {self.features}] with at least {self.least} samples"
            )
        return x

    def _check_targets(self, name: str, y: Any, x: Tensor, labels: bool) -> None:
        if not isinstance(y, Tensor):
            raise Unfusable(f"{name} is not one tensor")
        if labels:
            fits = y.dtype == torch.int64 and y.shape == x.shape[:2]
        else:
            fits = y.dtype == x.dtype and y.shape == (*x.shape[:2], self.classes)
        if not fits or y.device != x.device:
            what = "labels [T, S] of int64" if labels else "of the predictions' shape and dtype"
            raise Unfusable(f"{name} is not {what}")
        if y.requires_grad:
            raise Unfusable(f"{name} requires a gradient")

    def run(self, batch: Batch, steps: int, adapted: bool = False) -> InnerLoopResult:
        """The call.

        Args:
            batch: from `inputs`.
            steps: K, the number of steps.
            adapted: whether θ_K is returned.

        Returns:
            What comes of it.

        Raises:
            Unfusable: some labels do not count, or the surroundings need another path.
            ValueError: some labels are out of range.
            RuntimeError: the kernel's own.
        """
        if torch.is_autocast_enabled(self.device.type):
            raise Unfusable("autocast is on")
        if torch._C._are_functorch_transforms_active():
            raise Unfusable("a transform of torch.func is active")
        if self.step.derived:
            self._read_step()
        spec = self._specs.get((steps, adapted))
        if spec is None:
            spec = self._specs[steps, adapted] = Spec(
                self.model.layers, self.present, self.step.alpha, steps, self.losses,
                self.step.psd, self.rule.first_order, adapted, native=True, adapt=self.step.adapt,
            )  # fmt: skip
        try:
            return run(spec, self.flat, *batch)
        except RuntimeError as error:
            # The model is too large for a GPU's block, or for what the kernels count.
            if any([reason in str(error) for reason in ("shared memory", "fastkfo: too large")]):
                raise Unfusable(str(error).splitlines()[0]) from error
            if "expected labels" not in str(error):
                raise
            refused = error
        for name, y, labels in (("y_s", batch.y_s, 0), ("y_q", batch.y_q, 1)):
            if y is not None and self.labels[labels]:
                if bool((y == -100).any()):
                    raise Unfusable(f"{name} has labels that do not count (-100)")
                check_range(name, y, self.classes)
        raise refused

    def outcome(self, batch: Batch, steps: int, buffers: str) -> tuple[Outcome, list[TaskBuffers]]:
        """What comes of it, and the buffers to be committed."""
        found = self.run(batch, steps)
        outcome = Outcome(found.loss, found.predictions, found.support_loss, found.finite)
        if not self.model.norms or buffers != "shared":
            return outcome, []
        return outcome, [self._buffers(found.statistics, batch)]

    def _buffers(self, statistics: Tensor, batch: Batch) -> TaskBuffers:
        """What batch norms saw, as the passes of a batched model would have recorded it."""
        module = shell_of(self.rule.module)
        buffers = TaskBuffers(module, batch.x_s.shape[0], "shared")
        passes = statistics.shape[1]
        for k in range(passes):
            x = batch.x_q if batch.x_q is not None and k == passes - 1 else batch.x_s
            unbiased = x.shape[1] / (x.shape[1] - 1)
            for name, at in self.model.norms:
                norm: Any = module.get_submodule(name)
                width = norm.num_features
                mean = statistics[:, k, at : at + width]
                var = statistics[:, k, at + width : at + 2 * width]
                if norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.add_(1)
                momentum = 0.0 if norm.momentum is None else norm.momentum
                buffers.record(norm.running_mean, mean, momentum)
                buffers.record(norm.running_var, var * unbiased, momentum)
            buffers.accept(unchanged=False)
        return buffers
