"""Seeds of random streams: one number mixed from what names a stream, such as the seed, the draw and the example."""

_PRIME_1, _PRIME_2, _PRIME_5 = 11400714785074694791, 14029467366897019727, 2870177450012600261  # of xxHash64
_LANE_MODULUS = 2**61 - 1
_WORD = 2**64 - 1


def stream_seed(*parts: int) -> int:
    """Mix integers to the seed of a random stream; the same on every platform and in every version of Python.

    The mix is xxHash's with 64 bits in the variant that CPython has for tuples since 3.8, so that runs recorded when
    the builtin ``hash`` was called here keep their labels. It is written out because the builtin promises no value.

    Args:
        parts: what names the stream, in a fixed order. Each counts modulo ``2**61 - 1``; a negative number by the
            negative of its absolute value's remainder.

    Returns:
        An integer in ``[0, 2**63)``, which every ``torch.Generator`` takes.
    """
    mixed = _PRIME_5
    for part in parts:
        lane = part % _LANE_MODULUS if part >= 0 else -(-part % _LANE_MODULUS)
        mixed = (mixed + lane * _PRIME_2) & _WORD
        mixed = (mixed << 31 | mixed >> 33) & _WORD
        mixed = mixed * _PRIME_1 & _WORD
    mixed = (mixed + (len(parts) ^ _PRIME_5 ^ 3527539)) & _WORD
    return mixed % 2**63
