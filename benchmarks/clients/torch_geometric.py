"""torch-geometric: its DataLoader brings its collation; LightningDataset and LightningNodeData wrap it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F

from benchmarks.clients.job import job
from benchmarks.clients.styles.common import trainer


def _graphs() -> list[Any]:
    from torch_geometric.data import Data

    made = []
    for index in range(40):
        nodes = 5 + index % 6
        made.append(Data(torch.rand(nodes, 8), torch.randint(0, nodes, (2, 3 * nodes)), y=torch.tensor([index % 2])))
    return made


class GraphClassifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        from torch_geometric.nn import GIN, MLP

        self.gnn, self.classifier = GIN(8, 16, 2, dropout=0.5, jk="cat"), MLP([16, 16, 2], norm="batch_norm")

    def training_step(self, data: Any, batch_idx: int) -> torch.Tensor:
        from torch_geometric.nn import global_add_pool

        x = global_add_pool(self.gnn(data.x, data.edge_index), data.batch, size=data.num_graphs)
        loss = F.cross_entropy(self.classifier(x), data.y)
        self.log("train_loss", loss, batch_size=data.num_graphs)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


@job(size=4, count=lambda batch: batch.num_graphs)
def geometric_graphs(callbacks: list[Any]) -> None:
    """Graphs by its loader."""
    from torch_geometric.loader import DataLoader

    trainer(callbacks, module=pl).fit(GraphClassifier(), DataLoader(_graphs(), batch_size=4, shuffle=True))


@job(size=4, count=lambda batch: batch.num_graphs)
def geometric_datamodule(callbacks: list[Any]) -> None:
    """Graphs by its datamodule, which keeps the batch size among the loader's arguments."""
    from torch_geometric.data.lightning import LightningDataset

    graphs = _graphs()
    data = LightningDataset(graphs[:32], graphs[32:], batch_size=4, num_workers=0, persistent_workers=False)
    trainer(callbacks, module=pl).fit(GraphClassifier(), datamodule=data)
