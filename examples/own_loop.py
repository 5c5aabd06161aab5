"""Your own training loop with SAGE and error feedback: two lines beside torch's own.

python examples/own_loop.py            or, two workers: torchrun --nproc-per-node 2 examples/own_loop.py
(`pip install .` in the repository first; without it, python -m examples.own_loop there)
"""

import atexit

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  its usual name

import reducers

if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    atexit.register(dist.destroy_process_group)
rank = dist.get_rank() if dist.is_initialized() else 0

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))
truth = torch.nn.Linear(20, 4)  # what the model is to learn
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
exchange = reducers.attach(model, "sage", density=0.05)  # 1: every worker gets rank 0's weights

rng = torch.Generator().manual_seed(rank)  # other data on every worker
for step in range(100):
    x = torch.randn(64, 20, generator=rng)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), truth(x).argmax(1))
    loss.backward()
    exchange.step()  # 2: the gradient becomes the workers' mean; what was not sent waits for the next step
    optimizer.step()

    if rank == 0 and step % 20 == 19:
        print(f"step {step + 1}  loss {loss.item():.3f}  density {exchange.density:.4f}")
