"""Loops over epochs by hand, on kept views of training images or on the same images, read and encoded every time."""

import torch

from trainers.features.views import SeededViews


def epochs(trainer, loader, count):
    """Losses, step by step, of some epochs by hand, and the image numbers of each batch."""
    losses, order = [], []
    for trainer.epoch in range(count):
        trainer.dm.set_epoch(trainer.epoch)
        trainer.before_epoch()
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(trainer.epoch)
        trainer.set_model_mode("train")
        for trainer.batch_idx, batch in enumerate(loader):
            order.append(batch["index"].tolist())
            losses.append(trainer.forward_backward(batch)["loss"])
    return losses, order


class Uncached:
    """The same batches, as images: view `epoch mod V`, read and encoded every time."""

    def __init__(self, trainer, views, seed, order):
        self.views = SeededViews(trainer.train_loader_x.dataset, views, seed)
        self.n, self.v = len(trainer.train_loader_x.dataset), views
        self.order = iter(order)
        self.epoch, self.steps = 0, len(trainer.train_loader_x)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for _ in range(self.steps):
            rows = next(self.order)
            items = [self.views[self.epoch % self.v * self.n + i] for i in rows]
            labels = torch.tensor([item["label"] for item in items])
            yield {"img": torch.stack([i["img"] for i in items]), "label": labels, "index": torch.tensor(rows)}
