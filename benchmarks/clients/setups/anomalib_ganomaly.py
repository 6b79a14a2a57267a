"""anomalib's Ganomaly: a generator and a discriminator under manual optimization."""

from __future__ import annotations

from typing import Any

import torch
from anomalies import normal_images
from setup import SetUp, seeded

NAME = "anomalib: Ganomaly"
REQUIREMENTS = ["torchvision==0.29.1", "anomalib==2.7.0"]
ARGUMENTS = {"optimizer": 1}


def generator_loss(module: Any, batch: Any) -> torch.Tensor:
    """The loss whose gradient steps the generator, which the step does not return by itself."""
    padded, fake, latent_in, latent_out = module.model(batch.image)
    real, _ = module.model.discriminator(padded)
    faked, _ = module.model.discriminator(fake)
    return module.generator_loss(latent_in, latent_out, padded, fake, real, faked)


def build(seed: int) -> SetUp:
    """A narrow network on images of 32 x 32; the generator is asked about."""
    from anomalib.models import Ganomaly

    seeded(seed)
    sized = Ganomaly.configure_pre_processor(image_size=(32, 32))
    options: Any = {"pre_processor": sized, "evaluator": False, "visualizer": False}
    module = Ganomaly(batch_size=8, n_features=8, latent_vec_size=8, **options)
    return SetUp(module, normal_images(24, 8), loss=generator_loss)
