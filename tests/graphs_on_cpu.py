"""CUDA graphs' stand-in on a CPU: what is recorded runs again, into the same memory."""

import torch
from torch.utils._pytree import tree_map

from fastkfo.inner_loop.graphs import kept


class Graph:
    """Takes the place of fastkfo.inner_loop.graphs.Graph."""

    made = 0
    recording = None  # True while something is recorded
    buffers = ()  # what a body changes, and a recording must not; nor random states

    def __init__(self, device, first=None):
        Graph.made += 1

    def beside(self, body, tensors):
        return body(*tensors)

    def record(self, body):
        self.body, self.mode = body, torch.is_grad_enabled()
        Graph.recording = True
        try:
            with kept(Graph.buffers), torch.random.fork_rng([]):
                return self._keep(body())
        finally:
            Graph.recording = None

    def _keep(self, results):
        self.memory = tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, results)
        return results

    def replay(self):
        with torch.set_grad_enabled(self.mode):
            found = self.body()
        with torch.no_grad():
            tree_map(lambda a, b: a.copy_(b) if isinstance(a, torch.Tensor) else None,
                     self.memory, found)  # fmt: skip
