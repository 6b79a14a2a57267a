"""The generative adversarial network of Lightning's domain templates: two optimizers, manual optimization.

The discriminator is asked about: ``SourceCallback(optimizer=)`` says whose parameters are meant, as the callback asks.
"""

from __future__ import annotations

from typing import Any

import lightning.pytorch as L
import numpy as np
import torch
from images import digits
from setup import SetUp, seeded
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

NAME = "Lightning examples: GAN"
REQUIREMENTS = ["scikit-learn", "requests"]
ARGUMENTS = {"optimizer": 1}


class Generator(nn.Module):
    """Noise to an image, with batch normalisation, as in the template."""

    def __init__(self, latent_dim: int, img_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.img_shape = img_shape

        def block(in_feat: int, out_feat: int, normalize: bool = True) -> list[nn.Module]:
            layers: list[nn.Module] = [nn.Linear(in_feat, out_feat)]
            if normalize:
                layers.append(nn.BatchNorm1d(out_feat, 0.8))
            layers.append(nn.LeakyReLU(0.2, inplace=True))
            return layers

        self.model = nn.Sequential(
            *block(latent_dim, 16, normalize=False),
            *block(16, 32),
            nn.Linear(32, int(np.prod(img_shape))),
            nn.Tanh(),
        )

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.model(z).view(z.size(0), *self.img_shape)


class Discriminator(nn.Module):
    """An image to the probability that it is real."""

    def __init__(self, img_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.model = nn.Sequential(
            nn.Linear(int(np.prod(img_shape)), 32),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(32, 16),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(16, 1),
        )

    def forward(self, img: torch.Tensor) -> torch.Tensor:
        return self.model(img.view(img.size(0), -1))


class GAN(L.LightningModule):
    """The module of the template."""

    def __init__(self, img_shape: tuple[int, int, int] = (1, 8, 8), lr: float = 0.0002, latent_dim: int = 8) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = Generator(latent_dim=latent_dim, img_shape=img_shape)
        self.discriminator = Discriminator(img_shape=img_shape)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.generator(z)

    @staticmethod
    def adversarial_loss(y_hat: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, batch: Any) -> None:
        imgs, _ = batch
        opt_g, opt_d = self.optimizers()
        z = torch.randn(imgs.shape[0], self.hparams.latent_dim).type_as(imgs)
        valid = torch.ones(imgs.size(0), 1).type_as(imgs)

        self.toggle_optimizer(opt_g)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        opt_g.step()
        opt_g.zero_grad()
        self.untoggle_optimizer(opt_g)

        self.toggle_optimizer(opt_d)
        real_loss = self.adversarial_loss(self.discriminator(imgs), valid)
        fake = torch.zeros(imgs.size(0), 1).type_as(imgs)
        fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), fake)
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        opt_d.step()
        opt_d.zero_grad()
        self.untoggle_optimizer(opt_d)

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        lr = self.hparams.lr
        opt_g = torch.optim.Adam(self.generator.parameters(), lr=lr, betas=(0.5, 0.999))
        opt_d = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=(0.5, 0.999))
        return [opt_g, opt_d], []


def discriminator_loss(module: GAN, batch: Any) -> torch.Tensor:
    """The loss whose gradient steps the discriminator, which the step does not return."""
    imgs, _ = batch
    z = torch.randn(imgs.shape[0], module.hparams.latent_dim)
    real = module.adversarial_loss(module.discriminator(imgs), torch.ones(len(imgs), 1))
    fake = module.adversarial_loss(module.discriminator(module(z).detach()), torch.zeros(len(imgs), 1))
    return (real + fake) / 2


def build(seed: int) -> SetUp:
    """The module on scikit-learn's digits."""
    seeded(seed)
    return SetUp(GAN(), DataLoader(digits(64), batch_size=16, shuffle=True), loss=discriminator_loss, noisy=True)
