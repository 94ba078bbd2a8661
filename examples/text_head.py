"""A head made of text on stored embeddings: zero-shot scores, then an adapter trained with ELogitNorm.

The embeddings are made up; put those of your vision-language model in their place: `image_embeddings` (n, m),
`text_embeddings` (c, t, m) for t prompts a class.
"""

import torch
from torch import nn

import ood_fast
from ood_fast.detectors import MCM, BoundaryDistance
from ood_fast.metrics import auroc
from ood_fast.text import TextClassifier

N_CLASSES, N_PROMPTS, N_FEATURES = 10, 4, 64


def made_embeddings(names: torch.Tensor, n: int, noise: float) -> torch.Tensor:
    """Near a name each, and away from all of them by what images have in common."""
    nearest = names[torch.randint(len(names), (n,))]
    return nearest + noise * torch.randn(n, N_FEATURES) + 1.5 * torch.ones(N_FEATURES) / N_FEATURES**0.5


torch.manual_seed(0)
names = nn.functional.normalize(torch.randn(2 * N_CLASSES, N_FEATURES), dim=1)
text_embeddings = names[:N_CLASSES, None] + 0.05 * torch.randn(N_CLASSES, N_PROMPTS, N_FEATURES)
labels = torch.randint(N_CLASSES, (600,))
image_embeddings = names[labels] + 0.2 * torch.randn(600, N_FEATURES) + 1.5 / N_FEATURES**0.5
others = made_embeddings(names[N_CLASSES:], 600, 0.2)  # of classes that have no prompts


def measured(model: TextClassifier, title: str) -> None:
    """Accuracy, and AUROC of the detectors on images of classes without a prompt."""
    W = model.head.weight.detach()
    z, z_others = (nn.functional.normalize(model.encoder(x), dim=1).detach() for x in (image_embeddings, others))
    f, f_others = z @ W.T, z_others @ W.T
    accuracy = (f.argmax(dim=1) == labels).double().mean()
    print(f"{title}: accuracy {accuracy:.3f}", end="")
    for name, detector in {"MCM": MCM(temperature=0.01), "D": BoundaryDistance()}.items():
        detector.fit_features(None, head=(W, None))
        scores = detector.score_features(z, f), detector.score_features(z_others, f_others)
        print(f", AUROC {name} {auroc(*scores):.3f}", end="")
    print()


model = TextClassifier(None, text_embeddings)
measured(model, "zero-shot")

model.encoder = nn.Linear(N_FEATURES, N_FEATURES)  # an adapter over the stored embeddings; the names stay
nn.init.eye_(model.encoder.weight)
nn.init.zeros_(model.encoder.bias)
model.head.requires_grad_(False)
criterion = ood_fast.ELogitNormLoss(model.head)  # <-
optimizer = torch.optim.AdamW(model.encoder.parameters(), lr=1e-4)
for epoch in range(5):
    total = 0.0
    for rows in torch.randperm(600).split(100):
        loss = criterion(model(image_embeddings[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() / 6
    print(f"epoch {epoch + 1}: loss {total:.4f}")
measured(model, "with the adapter")
