"""A plain PyTorch training loop with ELogitNorm, then an OOD detector fitted, scored and saved."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torchvision
from made_data import N_CLASSES, images, noise
from torch.utils.data import DataLoader

import ood_fast


def main(n_epochs: int = 3, out: str = "nci.safetensors") -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = torchvision.models.resnet18(num_classes=N_CLASSES).to(device)
    criterion = ood_fast.ELogitNormLoss(model.fc)  # <- was: torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, nesterov=True)
    train_loader = DataLoader(images(128, seed=1), batch_size=32, shuffle=True)

    for epoch in range(n_epochs):
        model.train()
        for x, y in train_loader:
            loss = criterion(model(x.to(device)), y.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}")

    detector = ood_fast.detectors.NCI().fit(model, train_loader)
    x, y = images(64, seed=3).tensors
    inside, outside = detector.score(model, x), detector.score(model, noise(64))
    print(f"AUROC of NCI: {100 * ood_fast.metrics.auroc(inside, outside):.1f} %")
    detector.calibrate(inside, tpr=0.95).save(out)
    print(f"wrote {out}: {Path(out).stat().st_size} bytes, threshold {float(detector.threshold):.4g}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:2]))
