"""Pure mathematics on tensors: block gradients, EK-FAC, the unrolled segments, iterative solvers."""
