"""Student's t distribution, as much of it as intervals need."""

from __future__ import annotations

import math

import torch

_POINTS = 200_001


def student_quantile(level: float, degrees: int) -> float:
    """The ``t`` for which ``|T| <= t`` has the probability ``level``.

    With ``T = √ν tan φ`` the density of ``φ`` is proportional to ``cos(φ)^(ν - 1)``, which is summed by trapezia.

    Args:
        level: in (0, 1).
        degrees: ``ν``, at least 1.

    Example:
        >>> round(student_quantile(0.9, 4), 4)
        2.1318
    """
    angles = torch.linspace(0, math.pi / 2, _POINTS, dtype=torch.float64)
    density = angles.cos().clamp_min(0) ** (degrees - 1)
    below = torch.cat([density.new_zeros(1), ((density[1:] + density[:-1]) / 2).cumsum(0)])
    below /= below[-1].clone()
    right = int(torch.searchsorted(below, torch.tensor(level, dtype=torch.float64)))
    left = right - 1
    share = (level - float(below[left])) / float(below[right] - below[left])
    angle = float(angles[left]) + share * float(angles[right] - angles[left])
    return math.sqrt(degrees) * math.tan(angle)
