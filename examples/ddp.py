"""DistributedDataParallel: torchrun --nproc-per-node 2 examples/ddp.py

The gradients are those of one process on the joined batch: the loss reads the head's weight, which DDP keeps equal.
"""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from made_data import N_CLASSES, SIZE, images
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import ood_fast


def main(n_epochs: int = 3) -> None:
    use_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if use_gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_gpu else torch.device("cpu")
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 64), nn.ReLU())
    model = nn.Sequential(body, nn.Linear(64, N_CLASSES)).to(device)
    parallel = DistributedDataParallel(model)
    criterion = ood_fast.ELogitNormLoss(parallel, "1")  # <- was: nn.CrossEntropyLoss(); "1" is the name of the head
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.05)
    data = images(128, seed=1)
    sampler = DistributedSampler(data)
    for epoch in range(n_epochs):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(data, batch_size=16, sampler=sampler):
            loss = criterion(parallel(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if dist.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
    # A detector is fitted by all processes together, each on its part of the data.
    part = [tensor[dist.get_rank() :: dist.get_world_size()].to(device) for tensor in data.tensors]
    detector = ood_fast.detectors.NCI().fit(model, [tuple(part)], head="1", group=dist.group.WORLD)
    means = [torch.empty_like(detector.mean) for _ in range(dist.get_world_size())]
    dist.all_gather(means, detector.mean)
    assert all(torch.equal(mean, means[0]) for mean in means)
    if dist.get_rank() == 0:
        print(f"NCI fitted on {len(data)} images, mean feature of length {detector.mean.norm():.3f} on every process")
    dist.destroy_process_group()
    time.sleep(0.1)  # gloo's threads drop the gathered tensors; PyTorch aborts if the interpreter ends before they have


if __name__ == "__main__":
    main()
