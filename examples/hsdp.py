"""Top-k between two replicas of a model, each of which FSDP2 shards over two processes (hybrid sharding).

torchrun --nproc-per-node 4 examples/hsdp.py
(`pip install .` in the repository first; without it, torchrun --nproc-per-node 4 -m examples.hsdp there)
Needs torch 2.7 or newer.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  its usual name
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import reducers

mesh = init_device_mesh(
    "cpu", (2, 2), mesh_dim_names=("replicate", "shard")
)  # the slow links are between replicas
rank = dist.get_rank()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))
truth = torch.nn.Linear(20, 4)  # what the model is to learn
for layer in (model[0], model[2], model):
    fully_shard(layer, mesh=mesh["shard"])  # inside a replica gradients are averaged in full precision
hook = reducers.hook_fsdp(model, "topk", replicas=mesh["replicate"], density=0.05)  # before the first forward
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

rng = torch.Generator().manual_seed(rank)  # other data in every process
for step in range(100):
    x = torch.randn(64, 20, generator=rng)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), truth(x).argmax(1))
    loss.backward()  # the gradient is the estimate of the mean over all processes
    if hook.is_usable:  # no gradient is infinite or NaN, on any process
        optimizer.step()

    if rank == 0 and step % 20 == 19:
        print(f"step {step + 1}  loss {loss.item():.3f}  density {hook.density:.4f}")

dist.destroy_process_group()
