"""Derived seeds, for example one per client and round, one per step or one per image."""

import hashlib


def seed_of(*numbers: int) -> int:
    """Hash several numbers to one 32-bit seed, without the systematic collisions of a sum.

    The seed has 32 bits because torch's CPU generator ignores higher bits.
    """
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")
