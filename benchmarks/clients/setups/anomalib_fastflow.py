"""anomalib's Fastflow: normalising flows over the features of a frozen backbone, here with random weights."""

from __future__ import annotations

from anomalies import normal_images
from setup import SetUp, seeded

NAME = "anomalib: Fastflow"
REQUIREMENTS = ["torchvision==0.29.1", "anomalib==2.7.0"]


def build(seed: int) -> SetUp:
    """Two flow steps on images of 32 x 32."""
    from anomalib.models import Fastflow

    seeded(seed)
    sized = Fastflow.configure_pre_processor(image_size=(32, 32))
    module = Fastflow(pre_trained=False, flow_steps=2, pre_processor=sized, evaluator=False, visualizer=False)
    return SetUp(module, normal_images(24, 8))
