"""Hugging Face's Trainer with ELogitNorm: `compute_loss` is the one place to change."""

from __future__ import annotations

import tempfile

import torch
from made_data import N_CLASSES, images
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

import ood_fast


class ELogitNormTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        outputs = model(pixel_values=inputs["pixel_values"])
        criterion = ood_fast.ELogitNormLoss(model, "classifier")  # found inside DDP's and torch.compile's wrappers too
        loss = criterion(outputs.logits, inputs["labels"])  # <- was: torch.nn.functional.cross_entropy(...)
        return (loss, outputs) if return_outputs else loss


class Images(torch.utils.data.Dataset):
    def __init__(self, n: int, seed: int) -> None:
        self.x, self.y = images(n, seed).tensors

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index):
        return {"pixel_values": self.x[index], "labels": self.y[index]}


def main(n_epochs: int = 2) -> None:
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        num_labels=N_CLASSES,
    )
    model = ViTForImageClassification(config)  # or .from_pretrained("google/vit-base-patch16-224", ...)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=n_epochs,
            per_device_train_batch_size=32,
            learning_rate=1e-3,
            report_to=[],
            save_strategy="no",
            remove_unused_columns=False,
        )
        trainer = ELogitNormTrainer(model, arguments, train_dataset=Images(128, seed=1))
        result = trainer.train()
    print(f"loss {result.training_loss:.3f}")
    # Detectors take such models as they are: batches that are mappings, outputs with .logits.
    loader = torch.utils.data.DataLoader(Images(128, seed=1), batch_size=32)
    detector = ood_fast.detectors.NCI().fit(model, loader)
    print(f"NCI of one batch: {detector.score(model, {'pixel_values': Images(4, seed=3).x}).tolist()}")


if __name__ == "__main__":
    main()
