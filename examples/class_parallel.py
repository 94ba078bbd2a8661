"""Train with classes spread over processes, on made data: `torchrun --nproc-per-node 2 examples/class_parallel.py`.

Each process brings its own samples and holds its own part of the classes. The body is replicated, in
`DistributedDataParallel`; the head is a plain `nn.Linear` of this process's classes, and its logits are never stored.
In the end process 0 puts the parts together and computes the same loss alone.

Runs on CPUs over gloo, on GPUs over nccl where every process has one.
"""

import argparse
import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ood_fast
from ood_fast import distributed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--classes", type=int, default=2_001, help="in all; default %(default)s, uneven on purpose")
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--batch", type=int, default=128, help="samples of each process")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()

    local_rank, n_local = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    on_gpus = torch.cuda.device_count() >= n_local
    device = torch.device("cuda", local_rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpus else "gloo")
    rank, n_ranks = dist.get_rank(), dist.get_world_size()

    counts = [len(part) for part in torch.arange(options.classes).tensor_split(n_ranks)]
    n, m = options.batch * n_ranks, options.features
    if rank == 0:
        traffic = distributed.communication_bytes(n, m, n_ranks, without_logits=True, samples="sharded")
        print(f"{options.classes} classes on {n_ranks} processes: {counts}, {device.type}")
        print(f"the loss sends at most {traffic.per_rank / 2**20:.2f} MiB a process and step for any number of classes")

    # A class is a direction of the input; a sample is that direction and noise.
    directions = torch.randn(options.classes, m, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1 + rank)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.randint(0, options.classes, (options.batch,), generator=noise)
        x = directions[y] + 0.3 * torch.randn(options.batch, m, generator=noise)
        return x.to(device), y.to(device)

    torch.manual_seed(0)  # the same body everywhere
    body = nn.Sequential(nn.Linear(m, 2 * m), nn.ReLU(), nn.Linear(2 * m, m)).to(device)
    body = DistributedDataParallel(body, device_ids=[local_rank] if on_gpus else None)
    torch.manual_seed(1 + rank)  # another head
    head = nn.Linear(m, counts[rank], device=device)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)

    began = time.perf_counter()
    for step in range(1, options.steps + 1):
        x, y = batch()
        optimizer.zero_grad()
        loss = distributed.linear_elogitnorm(
            *(body(x), head.weight, head.bias, y),
            samples="sharded",
            feature_grad_scale=n_ranks,  # DistributedDataParallel divides by it
        )
        loss.backward()
        optimizer.step()
        if rank == 0 and (step % max(1, options.steps // 8) == 0 or step == options.steps):
            seconds = (time.perf_counter() - began) / step
            print(f"step {step:3}/{options.steps}  loss {loss.item():.4f}  {1e3 * seconds:.0f} ms a step", flush=True)

    # The same loss in one process: everything that the others hold, gathered for this check alone.
    x, y = batch()
    with torch.no_grad():
        z = body(x)
        loss = distributed.linear_elogitnorm(z, head.weight, head.bias, y, samples="sharded")
    parts = [None] * n_ranks
    dist.all_gather_object(parts, [t.detach().cpu() for t in (z, head.weight, head.bias, y)])
    z, W, b, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    alone = ood_fast.linear_elogitnorm(z, W, b, y)
    difference = abs(loss.item() - alone.item()) / abs(alone.item())
    if rank == 0:
        print(f"one process: {alone.item():.6f}, {n_ranks} processes: {loss.item():.6f}, the same to {difference:.0e}")
    dist.destroy_process_group()
    if difference > 1e-4:
        raise SystemExit("the loss of the processes is not that of one")


if __name__ == "__main__":
    main()
