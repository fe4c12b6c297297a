"""One of several processes of `torchrun`: its share of the tasks, under DistributedDataParallel."""

import json
import os
import sys

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import fastkfo
from tests.batches import batch, learner

TASKS, STEPS = 6, 3


def gradients(path, options):
    """The averaged meta-gradient on this rank, and how many all-reduces that took."""
    rank, world = dist.get_rank(), dist.get_world_size()
    share = TASKS // world
    own = [x[rank * share : (rank + 1) * share] for x in batch("cnn", TASKS)]
    loop = fastkfo.InnerLoop(learner("cnn", "kron-psd", **options), F.cross_entropy, STEPS, **path)
    parallel = DistributedDataParallel(loop)
    reductions = 0

    def counted(state, bucket):
        nonlocal reductions
        reductions += 1
        return allreduce_hook(state, bucket)

    parallel.register_comm_hook(None, counted)
    parallel(*own).loss.mean().backward()
    return [p.grad.flatten().tolist() for p in loop.parameters()], reductions


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    every = {}
    for name, (path, options) in json.loads(sys.argv[1]).items():
        grads, reductions = gradients(path, options)
        of_all = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, grads)
        agree = of_all[0] == of_all[1]
        every[name] = {"grads": grads, "agree": agree, "reductions": reductions}
    if dist.get_rank() == 0:
        print("found " + json.dumps(every), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # not through torch's own threads' end, which aborts now and then


if __name__ == "__main__":
    main()
