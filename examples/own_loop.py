"""Your own training loop with SAGE and error feedback: one line between backward and torch's optimizer.

python -m examples.own_loop            or, two workers: torchrun --nproc-per-node 2 -m examples.own_loop
"""

import atexit

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812  its usual name

from reducers import build_reducer
from sage.exchange.comm import connect_comm
from sage.exchange.exchange import Exchange
from sage.exchange.feedback import Residual, ResidualSettings
from sage.exchange.gradient import GradientBuffer
from sage.interfaces import Progress

STEPS_PER_EPOCH = 20

if dist.is_torchelastic_launched():
    dist.init_process_group("gloo")
    atexit.register(dist.destroy_process_group)
comm = connect_comm(dist.get_world_size() if dist.is_initialized() else 1)

torch.manual_seed(0)  # the same first weights on every worker
model = torch.nn.Sequential(torch.nn.Linear(20, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))
truth = torch.nn.Linear(20, 4)  # what the model is to learn
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

gradient = GradientBuffer(model)  # one flat vector; every param.grad is a view of it
reducer = build_reducer("sage", gradient.layout, worker=comm.rank, density=0.05)
feedback = Residual(ResidualSettings(), gradient.flat)  # keeps what was not sent, for the next step
exchange = Exchange(feedback, reducer, comm, gradient.layout)

rng = torch.Generator().manual_seed(comm.rank)  # other data on every worker
for step in range(100):
    x = torch.randn(64, 20, generator=rng)
    gradient.zero()  # in the place of optimizer.zero_grad()
    loss = F.cross_entropy(model(x), truth(x).argmax(1))
    loss.backward()

    # The gradient becomes the workers' mean. Schedules of density and learning rate follow the progress.
    lr = optimizer.param_groups[0]["lr"]
    exchange.average(gradient.flat, Progress(step / STEPS_PER_EPOCH, step, lr, STEPS_PER_EPOCH))
    optimizer.step()

    if comm.rank == 0 and step % 20 == 19:
        print(f"step {step + 1}  loss {loss.item():.3f}  density {reducer.density:.4f}")
