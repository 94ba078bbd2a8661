"""A LightningModule that trains with ELogitNorm."""

from __future__ import annotations

import lightning
import torch
import torchvision
from made_data import N_CLASSES, images
from torch.utils.data import DataLoader

import ood_fast


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = torchvision.models.resnet18(num_classes=N_CLASSES)
        self.criterion = ood_fast.ELogitNormLoss(self.model, "fc")  # <- was: torch.nn.CrossEntropyLoss()

    def training_step(self, batch, index):
        x, y = batch
        loss = self.criterion(self.model(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


def main(n_epochs: int = 2) -> Classifier:
    lightning.seed_everything(0)
    classifier = Classifier()
    trainer = lightning.Trainer(
        max_epochs=n_epochs, logger=False, enable_checkpointing=False, enable_model_summary=False, accelerator="auto"
    )
    trainer.fit(classifier, DataLoader(images(64, seed=1), batch_size=32, shuffle=True))
    print(f"loss {trainer.callback_metrics['loss'].item():.3f}")
    return classifier


if __name__ == "__main__":
    main()
