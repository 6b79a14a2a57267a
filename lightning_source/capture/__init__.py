"""How one forward and backward of the user's step is seen from outside."""
