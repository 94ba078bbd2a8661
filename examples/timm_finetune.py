"""A timm model, fine-tuned under autocast: ELogitNorm finds its head wherever timm put it."""

from __future__ import annotations

import sys

import timm
import torch
from made_data import N_CLASSES, images
from torch.utils.data import DataLoader

import ood_fast


def main(name: str = "vit_tiny_patch16_224", n_epochs: int = 2) -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # pretrained=True for weights; img_size only because the made images are small
    model = timm.create_model(name, num_classes=N_CLASSES, img_size=32, pretrained=False).to(device)
    head = ood_fast.heads.find_head(model)
    criterion = ood_fast.ELogitNormLoss(head)  # <- was: torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(n_epochs):
        for x, y in DataLoader(images(64, seed=1), batch_size=32, shuffle=True):
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = criterion(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
