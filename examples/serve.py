"""A service: an image in, its class, its score and whether it is out-of-distribution out; health says whether to worry.

    python examples/serve.py --port 8000
    curl --data-binary @image.png http://127.0.0.1:8000/score
    curl http://127.0.0.1:8000/health

By `ood_fast.serving`, Python's own server, so that nothing has to be installed.
"""

from __future__ import annotations

import argparse
import logging

import torch
from made_data import N_CLASSES, SIZE, images
from torch import nn
from torch.utils.data import DataLoader

import ood_fast
from ood_fast.data.images import preparation
from ood_fast.serving import Service, server


def made_service() -> Service:
    """A small model on made images; in its place: `models.create`, `models.load_checkpoint` and `detectors.load`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, N_CLASSES))
    criterion, optimizer = (
        ood_fast.ELogitNormLoss(model[-1]),
        torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
    )
    loader = DataLoader(images(256, seed=1), batch_size=32, shuffle=True)
    for _ in range(3):
        for x, y in loader:
            optimizer.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
    logging.info("trained, loss %.3f", loss.item())
    detector = ood_fast.detectors.NCI().fit(model, loader)
    scores = detector.score(model, images(300, seed=3).tensors[0])
    detector.calibrate(scores, alpha=0.05)
    monitor = ood_fast.Monitor(scores, alpha=0.001, threshold=detector.threshold)
    prepare = preparation(SIZE, SIZE, (0.5, 0.5, 0.5), (0.15, 0.15, 0.15))
    return Service(ood_fast.deploy(model, detector), prepare, monitor, [f"pattern {k}" for k in range(N_CLASSES)])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8000)
    logging.basicConfig(level=logging.INFO)
    with server(made_service(), port=parser.parse_args().port) as listening:
        logging.info("serving at http://%s:%d", *listening.server_address)
        try:
            listening.serve_forever()
        except KeyboardInterrupt:
            logging.info("stopped")


if __name__ == "__main__":
    main()
