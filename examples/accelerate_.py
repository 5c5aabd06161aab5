"""PowerSGD in a training loop with accelerate: one line after prepare.

torchrun --nproc-per-node 2 examples/accelerate_.py
(`pip install .` in the repository first; without it, torchrun --nproc-per-node 2 -m examples.accelerate_)
"""

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from accelerate import Accelerator
from torch.utils.data import DataLoader, TensorDataset

import reducers

accelerator = Accelerator(cpu=True)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(20, 256), torch.nn.ReLU(), torch.nn.Linear(256, 4))
x = torch.randn(12_800, 20)
y = torch.nn.Linear(20, 4)(x).argmax(1)  # what the model is to learn
loader = DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
model, optimizer, loader = accelerator.prepare(model, optimizer, loader)  # the model is DDP's from here on
hook = reducers.hook(model, "powersgd", rank=2)

for step, (x, y) in enumerate(loader):  # each worker gets batches of its own
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    accelerator.backward(loss)  # the gradient is the estimate of the workers' mean
    if hook.is_usable:  # no worker's gradient is infinite or NaN
        optimizer.step()

    if step % 20 == 19:
        sent = hook.comm.ledger.payload_bytes / (step + 1)
        accelerator.print(f"step {step + 1}  loss {loss.item():.3f}  bytes a step {sent:.0f}")

accelerator.end_training()
