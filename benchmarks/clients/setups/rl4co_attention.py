"""A routing policy trained by REINFORCE, as in RL4CO's quickstart."""

from __future__ import annotations

import lightning.pytorch as L
from rl4co.envs import TSPEnv
from rl4co.models import REINFORCE, AttentionModelPolicy
from setup import SetUp

NAME = "rl4co: attention model"
REQUIREMENTS = ["rl4co==0.7.0"]


def build(seed: int) -> SetUp:
    """The policy on small travelling salesman problems."""
    L.seed_everything(seed, verbose=False)
    env = TSPEnv(generator_params={"num_loc": 5})
    policy = AttentionModelPolicy(
        env_name=env.name, embed_dim=16, num_encoder_layers=1, num_heads=2, feedforward_hidden=16, normalization="layer"
    )
    module = REINFORCE(
        env,
        policy,
        baseline="exponential",
        batch_size=8,
        train_data_size=32,
        val_data_size=8,
        test_data_size=8,
        optimizer_kwargs={"lr": 1e-3},
    )
    return SetUp(module, noisy=True)
