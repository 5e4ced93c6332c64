"""Generative models: diffusion, codebooks, flows, differential equations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manyhands as mh
from zoo.case import Samples, case, labelled, normal, recipe
from zoo.pictures import own_loss


def negative_log_prob(model: Any, batch: Tensor) -> Tensor:
    """Return the loss of a model with `log_prob`."""
    return -model.log_prob(batch).mean()


@case("diffusers", "U-Net with DDPM")
def diffusion() -> mh.Recipe:
    """Noise and times that the loss draws; a scheduler outside of the model."""
    from diffusers import DDPMScheduler, UNet2DModel

    def model() -> nn.Module:
        return UNet2DModel(
            sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=4, dropout=0.1,
        )  # fmt: skip

    scheduler = DDPMScheduler(num_train_timesteps=50)

    def loss(model: nn.Module, pictures: Tensor) -> Tensor:
        noise, times = torch.randn_like(pictures), torch.randint(0, 50, (len(pictures),))
        return F.mse_loss(model(scheduler.add_noise(pictures, noise, times), times).sample, noise)

    return recipe(model, loss, normal(3, 8, 8))


@case("diffusers", "AutoencoderKL")
def autoencoder() -> mh.Recipe:
    """A sampled posterior, group norms, recomputed activations; the methods encode and decode, not forward."""
    from diffusers import AutoencoderKL

    def model() -> nn.Module:
        net = AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, latent_channels=4,
        )  # fmt: skip
        net.enable_gradient_checkpointing()
        return net

    def loss(model: Any, pictures: Tensor) -> Tensor:
        found = model.encode(pictures).latent_dist
        return F.mse_loss(model.decode(found.sample()).sample, pictures) + 1e-3 * found.kl().mean()

    return recipe(model, loss, normal(3, 8, 8))


@case("denoising-diffusion-pytorch", "Gaussian diffusion")
def denoising() -> mh.Recipe:
    """Self-conditioning that Python's generator switches; the schedule is in fp32 buffers."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    def model() -> nn.Module:
        unet = Unet(dim=8, dim_mults=(1, 2), flash_attn=False, self_condition=True, attn_heads=2, attn_dim_head=8)
        return GaussianDiffusion(unet, image_size=16, timesteps=20)

    return recipe(model, own_loss, Samples(lambda generator: torch.rand(3, 16, 16, generator=generator)))


@case("vector-quantize-pytorch", "VectorQuantize with moving averages")
def codebook() -> mh.Recipe:
    """Forward replaces the codebook's buffers, initialises them by k-means and revives dead codes at random."""
    from vector_quantize_pytorch import VectorQuantize

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(16, 8), nn.Linear(8, 16)
            self.quantize = VectorQuantize(8, codebook_size=12, decay=0.8, kmeans_init=True, threshold_ema_dead_code=1)

        def forward(self, x: Tensor) -> Tensor:
            found, _, penalty = self.quantize(self.encode(x))
            return F.mse_loss(self.decode(found), x) + penalty.sum()

    return recipe(Autoencoder, own_loss, normal(20, 16))


@case("vector-quantize-pytorch", "residual FSQ and LFQ")
def lookup_free() -> mh.Recipe:
    """Codes without a codebook; an entropy loss; dropped quantizers."""
    from vector_quantize_pytorch import LFQ, ResidualFSQ

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(16, 8), nn.Linear(8, 16)
            self.coarse = ResidualFSQ(dim=8, levels=[4, 4, 4], num_quantizers=2, quantize_dropout=True)
            self.fine = LFQ(codebook_size=16, dim=8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.encode(x)
            coarse, _ = self.coarse(hidden)
            fine, _, penalty = self.fine(hidden - coarse)
            return F.mse_loss(self.decode(coarse + fine), x) + penalty

    return recipe(Autoencoder, own_loss, normal(20, 16))


@case("zuko", "neural spline flow")
def spline_flow() -> mh.Recipe:
    """Masked linear layers whose masks are buffers; distributions that forward creates."""
    import zuko

    return recipe(
        lambda: zuko.flows.NSF(4, transforms=2, hidden_features=(16, 16)),
        lambda model, batch: -model().log_prob(batch).mean(),
        normal(4),
    )


@case("nflows", "masked autoregressive flow")
def autoregressive_flow() -> mh.Recipe:
    """Batch norm as a transform, permutations in buffers, methods other than forward."""
    from nflows.distributions.normal import StandardNormal
    from nflows.flows.base import Flow
    from nflows.transforms import (
        BatchNorm,
        CompositeTransform,
        MaskedAffineAutoregressiveTransform,
        RandomPermutation,
    )

    def model() -> nn.Module:
        parts = [
            [RandomPermutation(4), MaskedAffineAutoregressiveTransform(4, hidden_features=16), BatchNorm(4)]
            for _ in range(2)
        ]
        return Flow(CompositeTransform(parts[0] + parts[1]), StandardNormal([4]))

    return recipe(model, negative_log_prob, normal(4), batch=mh.Batch(global_size=16, micro_size=4))


@case("normflows", "coupling flow")
def coupling_flow() -> mh.Recipe:
    """Coupling layers, and permutations that are trained as LU factors."""
    import normflows as nf

    def model() -> nn.Module:
        flows: list[nn.Module] = []
        for _ in range(2):
            net = nf.nets.MLP([2, 16, 4], init_zeros=True)
            flows += [nf.flows.AffineCouplingBlock(net), nf.flows.LULinearPermute(4)]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(4), flows)

    return recipe(model, lambda model, batch: model.forward_kld(batch), normal(4))


@case("normflows", "activation norm")
def activation_norm() -> mh.Recipe:
    """The first forward sets parameters from its batch."""
    import normflows as nf

    def model() -> nn.Module:
        flows = [nf.flows.ActNorm(4), nf.flows.LULinearPermute(4)]
        return nf.NormalizingFlow(nf.distributions.DiagGaussian(4), flows)

    return recipe(model, lambda model, batch: model.forward_kld(batch), normal(4))


@case("torchdiffeq", "neural ODE with the adjoint method")
def neural_ode() -> mh.Recipe:
    """An adaptive solver calls a module a data-dependent number of times; its own backward calls autograd inside."""
    from torchdiffeq import odeint_adjoint

    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 4))

        def forward(self, time: Tensor, state: Tensor) -> Tensor:
            return self.net(state) * (1 + time)

    class Ode(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.field, self.head = Field(), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(odeint_adjoint(self.field, x, torch.tensor([0.0, 1.0]), rtol=1e-3, atol=1e-3)[-1])

    return recipe(Ode, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), labelled(4))


@case("torchsde", "neural SDE")
def neural_sde() -> mh.Recipe:
    """A Brownian motion with random numbers of its own, drift and diffusion as methods of one module."""
    import torchsde

    class Sde(nn.Module):
        noise_type, sde_type = "diagonal", "ito"

        def __init__(self) -> None:
            super().__init__()
            self.drift, self.diffusion = nn.Linear(3, 3), nn.Linear(3, 3)

        def f(self, time: Tensor, state: Tensor) -> Tensor:
            return self.drift(state)

        def g(self, time: Tensor, state: Tensor) -> Tensor:
            return self.diffusion(state).sigmoid()

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        found = torchsde.sdeint(model, batch, torch.tensor([0.0, 0.5]), dt=0.1, method="euler")
        return found[-1].square().mean()

    return recipe(Sde, loss, normal(3))
