"""PowerSGD under Lightning: a callback of a few lines, the module stays as it is.

python examples/lightning_.py          starts two processes by itself
(`pip install .` in the repository first; without it, python -m examples.lightning_ there)
"""

from typing import Any

import lightning
import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import reducers


class Compression(lightning.Callback):
    """Exchanges the gradients through a reducer."""

    def __init__(self, name: str, **settings: Any) -> None:
        self.name, self.settings = name, settings

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.hook = reducers.hook(trainer.strategy.model, self.name, **self.settings)  # type: ignore[arg-type]

    def on_after_backward(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        if (
            not self.hook.is_usable
        ):  # some worker's gradient is infinite or NaN: leave the weights as they are
            module.zero_grad()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, *batch: Any
    ) -> None:
        if trainer.is_global_zero and trainer.global_step % 20 == 0:
            sent = self.hook.comm.ledger.payload_bytes / trainer.global_step
            print(f"step {trainer.global_step}  loss {outputs['loss']:.3f}  bytes a step {sent:.0f}")


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(20, 256), nn.ReLU(), nn.Linear(256, 4))

    def training_step(self, batch: list[Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.model(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


torch.manual_seed(0)
x = torch.randn(12_800, 20)
y = nn.Linear(20, 4)(x).argmax(1)  # what the model is to learn
trainer = lightning.Trainer(
    accelerator="cpu",
    devices=2,
    strategy="ddp",
    max_epochs=1,
    callbacks=[Compression("powersgd", rank=2)],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(), DataLoader(TensorDataset(x, y), batch_size=64, shuffle=True))
