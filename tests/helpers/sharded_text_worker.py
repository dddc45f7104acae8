"""One of several processes that train a DLRCLIPNetwork data-parallel for one step, each on its share of the images.

    python sharded_text_worker.py RANK PROCESSES RENDEZVOUS_FILE RESULT_FILE

The process of rank 0 writes the parameters' gradients, averaged over the processes as DistributedDataParallel does.
"""

import sys

import torch
import torch.distributed as dist
from random_clip import random_open_clip

from trainers.clip import CLIP
from trainers.dlrclip.config import DLRCLIPConfig
from trainers.dlrclip.network import DLRCLIPNetwork

CLASSES = ["ox", "sea lake", "a very large hot air balloon", "forest", "industrial buildings over there"]
IMAGES = 4


def gradients(rank, processes):
    """Loss terms and the gradient of each learnt parameter for the images that are this process's share."""
    torch.manual_seed(0)
    clip = CLIP(random_open_clip(vision_layers=2, text_layers=3), name="random")
    network = DLRCLIPNetwork(
        clip, CLASSES, ["a photo of a {}."], DLRCLIPConfig(start=2, end=3, dim=8, scale=0.5, glr_dim=8)
    ).train()
    images = torch.randn(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(IMAGES)
    share = slice(rank * IMAGES // processes, (rank + 1) * IMAGES // processes)
    losses = network.losses(network(images[share]), labels[share])
    sum(losses.values(), torch.zeros(())).backward()
    return {name: parameter.grad for name, parameter in network.learner.named_parameters()}


def main():
    rank, processes, rendezvous, result = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=processes)
    found = gradients(rank, processes)
    for grad in found.values():
        dist.all_reduce(grad)
        grad /= processes
    if rank == 0:
        torch.save(found, result)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
