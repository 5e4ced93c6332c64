"""Models of graphs, geometry, Gaussian processes, spikes and tables; losses and modules with state of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

import manyhands as mh
from zoo.case import Samples, case, integer, labelled, normal, recipe
from zoo.pictures import classification, own_loss


def graphs() -> Samples:
    """Small graphs of torch_geometric with 3 to 6 nodes and a label."""
    from torch_geometric.data import Data

    def make(generator: Generator) -> Any:
        count = 3 + int(integer(generator, 4))
        edges = torch.randint(0, count, (2, 3 * count), generator=generator)
        return Data(x=torch.randn(count, 8, generator=generator), edge_index=edges, y=integer(generator, 5).reshape(1))

    return Samples(make)


@case("torch-geometric", "GCN, GAT and graph norm")
def graph_network() -> mh.Recipe:
    """Batches of a class of its own, with other shapes each time; sums over the edges of a node."""
    from torch_geometric.data import Batch
    from torch_geometric.nn import GATConv, GCNConv, GraphNorm, global_mean_pool

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm = GCNConv(8, 16), GraphNorm(16)
            self.second, self.head = GATConv(16, 8, heads=2, dropout=0.1), nn.Linear(16, 5)

        def forward(self, data: Any) -> Tensor:
            x = self.norm(self.first(data.x, data.edge_index), data.batch).relu()
            return self.head(global_mean_pool(self.second(x, data.edge_index), data.batch))

    return recipe(
        Net, lambda model, batch: F.cross_entropy(model(batch), batch.y), graphs(), collate=Batch.from_data_list
    )


@case("torch-geometric", "GIN with pooling")
def pooling() -> mh.Recipe:
    """Batch norm over nodes, of which a micro-batch has a varying number; top-k pooling drops some."""
    from torch_geometric.data import Batch
    from torch_geometric.nn import GIN, TopKPooling, global_add_pool

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.pool = GIN(8, 16, num_layers=2, norm="batch_norm", dropout=0.1), TopKPooling(16)
            self.head = nn.Linear(16, 5)

        def forward(self, data: Any) -> Tensor:
            x, _, _, batch, _, _ = self.pool(self.body(data.x, data.edge_index), data.edge_index, batch=data.batch)
            return self.head(global_add_pool(x, batch))

    return recipe(
        Net, lambda model, batch: F.cross_entropy(model(batch), batch.y), graphs(), collate=Batch.from_data_list
    )


@case("e3nn", "equivariant tensor product")
def equivariant() -> mh.Recipe:
    """Code that the package generates and scripts; weights in one flat parameter; constants in buffers."""
    from e3nn import o3
    from e3nn.nn import BatchNorm, Gate

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            gate = Gate("8x0e", [torch.relu], "4x0e", [torch.sigmoid], "4x1o")
            self.product = o3.FullyConnectedTensorProduct("4x0e + 2x1o", "1x0e + 1x1o", gate.irreps_in)
            self.gate, self.norm = gate, BatchNorm(gate.irreps_out)
            self.head = o3.Linear(gate.irreps_out, "1x0e")

        def forward(self, x: Tensor) -> Tensor:
            directions = o3.spherical_harmonics("1x0e + 1x1o", x[:, -3:], normalize=True)
            return self.head(self.norm(self.gate(self.product(x, directions))))

    return recipe(
        Net, lambda model, batch: model(batch).square().mean(), normal(10), batch=mh.Batch(global_size=16, micro_size=4)
    )


@case("gpytorch", "variational Gaussian process")
def gaussian_process() -> mh.Recipe:
    """The first call initialises parameters through their data, so the model is called once before it is returned."""
    import gpytorch

    class Gp(gpytorch.models.ApproximateGP):
        def __init__(self) -> None:
            points = torch.linspace(-1, 1, 8).unsqueeze(1).repeat(1, 2)
            distribution = gpytorch.variational.CholeskyVariationalDistribution(8)
            super().__init__(
                gpytorch.variational.VariationalStrategy(self, points, distribution, learn_inducing_locations=True)
            )
            self.mean_module = gpytorch.means.ConstantMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=2))
            self.likelihood = gpytorch.likelihoods.GaussianLikelihood()

        def forward(self, x: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    def loss(model: Any, batch: Tensor) -> Tensor:
        objective = gpytorch.mlls.VariationalELBO(model.likelihood, model, num_data=32)
        return -objective(model(batch[:, :2]), batch[:, 2])

    def model() -> nn.Module:
        built = Gp()
        built(torch.zeros(2, 2))
        return built

    return recipe(model, loss, normal(3), batch=mh.Batch(global_size=16, micro_size=4))


@case("botorch", "exact Gaussian process")
def exact_process() -> mh.Recipe:
    """The training data are attributes of the model, outside of its buffers; priors add to the loss."""
    from botorch.models import SingleTaskGP
    from gpytorch.mlls import ExactMarginalLogLikelihood

    points = torch.randn(16, 2, generator=torch.Generator().manual_seed(0))

    def loss(model: Any, batch: Tensor) -> Tensor:
        objective = ExactMarginalLogLikelihood(model.likelihood, model)
        return batch.square().mean() - objective(model(*model.train_inputs), model.train_targets)

    return recipe(lambda: SingleTaskGP(points, points.sin().sum(1, keepdim=True)), loss, normal(2))


@case("snntorch", "spiking network")
def spiking() -> mh.Recipe:
    """Membrane potentials in buffers whose shape forward changes; surrogate gradients; trained decay."""
    import snntorch as snn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 5)
            self.spikes, self.output = snn.Leaky(beta=0.9, learn_beta=True), snn.Leaky(beta=0.8)

        def forward(self, x: Tensor) -> Tensor:
            inner, outer = self.spikes.init_leaky(), self.output.init_leaky()
            potentials = []
            for _ in range(4):
                spikes, inner = self.spikes(self.first(x), inner)
                _, outer = self.output(self.second(spikes), outer)
                potentials.append(outer)
            return torch.stack(potentials).sum(0)

    return recipe(Net, classification, labelled(8))


@case("torchmetrics", "metrics inside of the model")
def metrics() -> mh.Recipe:
    """Counts that forward adds to; they are attributes of a module, neither parameters nor buffers."""
    from torchmetrics.classification import MulticlassAccuracy

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.accuracy = nn.Linear(8, 5), MulticlassAccuracy(5)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            logits = self.net(x)
            self.accuracy.update(logits, labels)
            return F.cross_entropy(logits, labels)

    return recipe(Net, lambda model, batch: model(*batch), labelled(8), attributes={"accuracy.*": "keep"})


@case("tensordict", "modules that read and write by name")
def by_name() -> mh.Recipe:
    """Samples and intermediate results are dicts of tensors of a class of its own."""
    from tensordict import TensorDict
    from tensordict.nn import TensorDictModule, TensorDictSequential

    def model() -> nn.Module:
        return TensorDictSequential(
            TensorDictModule(nn.Linear(8, 16), in_keys=["x"], out_keys=[("hidden", "first")]),
            TensorDictModule(nn.Sequential(nn.Tanh(), nn.Linear(16, 5)), in_keys=[("hidden", "first")], out_keys=["y"]),
        )

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(TensorDict({"x": batch[0]}, batch_size=[2]))["y"], batch[1])

    return recipe(model, loss, labelled(8))


@case("pytorch-metric-learning", "ArcFace with a miner")
def metric_learning() -> mh.Recipe:
    """A loss with weights, and pairs that a miner chooses."""
    from pytorch_metric_learning import losses, miners

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
            self.arcface, self.contrast = losses.ArcFaceLoss(5, 8), losses.NTXentLoss()

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            found = self.body(x)
            pairs = miners.MultiSimilarityMiner()(found, labels)
            return self.arcface(found, labels, pairs) + self.contrast(found, labels)

    return recipe(
        Net,
        lambda model, batch: model(*batch),
        labelled(8, classes=2),
        batch=mh.Batch(global_size=16, micro_size=4),
    )


@case("pytorch-metric-learning", "memory of earlier batches")
def earlier_batches() -> mh.Recipe:
    """A queue of embeddings in buffers, with the position in it in a plain attribute."""
    from pytorch_metric_learning import losses

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.memory = nn.Linear(8, 8), losses.CrossBatchMemory(losses.NTXentLoss(), 8, memory_size=16)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return self.memory(self.body(x), labels)

    return recipe(
        Net,
        lambda model, batch: model(*batch),
        labelled(8, classes=2),
        batch=mh.Batch(global_size=16, micro_size=4),
        buffers={"memory.*": "last"},
    )


@case("pytorch-metric-learning", "triplet loss with a miner")
def triplets() -> mh.Recipe:
    """The number of triplets depends on the data; the loss of a micro-batch without any is zero."""
    from pytorch_metric_learning import losses, miners

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        found = model(batch[0])
        return losses.TripletMarginLoss(margin=0.5)(found, batch[1], miners.TripletMarginMiner(0.5)(found, batch[1]))

    return recipe(lambda: nn.Linear(8, 8), loss, labelled(8, classes=2), batch=mh.Batch(global_size=16, micro_size=4))


@case("info-nce-pytorch", "InfoNCE")
def info_nce() -> mh.Recipe:
    """A loss over all pairs of a micro-batch."""
    from info_nce import InfoNCE

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return InfoNCE()(model(batch), model(batch + 0.1 * torch.randn_like(batch)))

    return recipe(lambda: nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 8)), loss, normal(8))


@case("ema-pytorch", "a moving average inside of the model")
def moving_average() -> mh.Recipe:
    """Forward updates a copy of the parameters, which is a frozen module."""
    from ema_pytorch import EMA

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 5)
            self.average = EMA(self.net, beta=0.9, update_every=1, update_after_step=0, include_online_model=False)

        def forward(self, x: Tensor) -> Tensor:
            self.average.update()
            return self.net(x) + 0.1 * self.average(x)

    return recipe(Net, classification, labelled(8))


@case("byol-pytorch", "BYOL")
def byol() -> mh.Recipe:
    """Finds a hidden layer by a hook; the constructor calls the model; the target is a deep copy."""
    from byol_pytorch import BYOL

    def model() -> nn.Module:
        body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 16))
        return BYOL(body, image_size=16, hidden_layer=-1, projection_size=8, projection_hidden_size=16)

    return recipe(model, own_loss, Samples(lambda generator: torch.rand(3, 16, 16, generator=generator)))


@case("deepctr-torch", "DeepFM")
def click_rate() -> mh.Recipe:
    """A dict of embeddings by column, a penalty over parameters that the model keeps in a list of its own."""
    from deepctr_torch.inputs import DenseFeat, SparseFeat
    from deepctr_torch.models import DeepFM

    def model() -> nn.Module:
        columns = [SparseFeat("user", 7, embedding_dim=4), SparseFeat("item", 9, embedding_dim=4), DenseFeat("age", 1)]
        return DeepFM(columns, columns, dnn_hidden_units=(16, 8), dnn_dropout=0.1, dnn_use_bn=True, seed=1)

    def make(generator: Generator) -> tuple[Tensor, Tensor]:
        row = [float(integer(generator, 7)), float(integer(generator, 9)), float(torch.rand((), generator=generator))]
        return torch.tensor(row), integer(generator, 2).float()

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty = model.get_regularization_loss().sum() + model.aux_loss.sum()
        return F.binary_cross_entropy(model(batch[0]).flatten(), batch[1]) + penalty

    return recipe(model, loss, Samples(make))


@case("pytorch-tabnet", "TabNet")
def tabnet() -> mh.Recipe:
    """Ghost batch norm over parts of a micro-batch, sparsemax with a backward of its own."""
    from pytorch_tabnet.tab_network import TabNet

    def model() -> nn.Module:
        groups = torch.eye(8)
        return TabNet(8, 5, n_d=4, n_a=4, n_steps=2, virtual_batch_size=2, group_attention_matrix=groups)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits, sparsity = model(batch[0])
        return F.cross_entropy(logits, batch[1]) - 1e-3 * sparsity

    return recipe(model, loss, labelled(8), batch=mh.Batch(global_size=16, micro_size=4))


@case("neuralforecast", "NHITS")
def forecast() -> mh.Recipe:
    """A LightningModule; blocks that pool and interpolate, on residuals."""
    from neuralforecast.losses.pytorch import MAE
    from neuralforecast.models import NHITS

    def model() -> nn.Module:
        return NHITS(h=4, input_size=8, mlp_units=[[16, 16]] * 3, dropout_prob_theta=0.1, loss=MAE())

    def loss(model: Any, batch: Tensor) -> Tensor:
        past = batch[:, :8, None]
        windows = {"insample_y": past, "insample_mask": torch.ones_like(past[..., 0])}
        windows |= {"hist_exog": None, "futr_exog": None, "stat_exog": None}
        return F.l1_loss(model(windows).squeeze(-1), batch[:, 8:])

    return recipe(model, loss, normal(12))


@case("pytorch-forecasting", "temporal fusion layers")
def fusion() -> mh.Recipe:
    """Gated residual networks, variable selection over dicts, an attention with shared heads."""
    from pytorch_forecasting.metrics import QuantileLoss
    from pytorch_forecasting.models.temporal_fusion_transformer.sub_modules import (
        InterpretableMultiHeadAttention,
        VariableSelectionNetwork,
    )

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            names = {"price": 4, "volume": 4}
            self.names = list(names)
            self.select = VariableSelectionNetwork(names, hidden_size=8, dropout=0.1)
            self.attention = InterpretableMultiHeadAttention(n_head=2, d_model=8, dropout=0.1)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden, _ = self.select({name: x[..., index : index + 1] for index, name in enumerate(self.names)})
            hidden, _ = self.attention(hidden, hidden, hidden)
            return self.head(hidden)

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return QuantileLoss([0.1, 0.5, 0.9]).loss(model(batch), batch[..., 0]).mean()

    return recipe(Net, loss, normal(6, 2))


@case("lightning", "training_step of a LightningModule")
def lightning_module() -> mh.Recipe:
    """The module's own training_step is the loss; hyperparameters and a metric are attributes."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self, width: int = 16) -> None:
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 5))

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

    return recipe(Module, lambda model, batch: model.training_step(batch, 0), labelled(8))  # type: ignore[operator]


@case("neuraloperator", "Fourier neural operator")
def fourier_operator() -> mh.Recipe:
    """Complex parameters in factorized spectral convolutions."""
    from neuralop.models import FNO

    return recipe(
        lambda: FNO(n_modes=(4, 4), in_channels=1, out_channels=1, hidden_channels=8, n_layers=2),
        lambda model, batch: (model(batch) - batch.roll(1, -1)).square().mean(),
        normal(1, 8, 8),
    )
