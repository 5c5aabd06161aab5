"""PowerSGD inside DistributedDataParallel, overlapped with backward: one line beside torch's own.

torchrun --nproc-per-node 2 examples/ddp.py
(`pip install .` in the repository first; without it, torchrun --nproc-per-node 2 -m examples.ddp there)
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  its usual name
from torch.nn.parallel import DistributedDataParallel

import reducers

dist.init_process_group("gloo")
rank = dist.get_rank()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))
truth = torch.nn.Linear(20, 4)  # what the model is to learn
ddp = DistributedDataParallel(model)
hook = reducers.hook(ddp, "powersgd", rank=2)  # before the first backward
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)

rng = torch.Generator().manual_seed(rank)  # other data on every worker
for step in range(100):
    x = torch.randn(64, 20, generator=rng)
    optimizer.zero_grad()
    loss = F.cross_entropy(ddp(x), truth(x).argmax(1))
    loss.backward()  # the gradient is the estimate of the workers' mean
    if hook.is_usable:  # no worker's gradient is infinite or NaN; a GradScaler asks this by itself
        optimizer.step()

    if rank == 0 and step % 20 == 19:
        sent = hook.comm.ledger.payload_bytes / (step + 1)
        print(f"step {step + 1}  loss {loss.item():.3f}  bytes a step {sent:.0f}")

dist.destroy_process_group()
