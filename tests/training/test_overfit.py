import torch
from torch.nn import functional as F

from qtvit.models import build_model


def test_a_batch_of_random_labels_is_learnt_by_heart() -> None:
    model = build_model("qtvit_nano", num_classes=5, img_size=16).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    images = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(20) % 5
    for _ in range(30):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
