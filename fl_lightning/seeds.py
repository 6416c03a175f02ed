"""Seeds of what must be drawn alike again: of one client in one round, of one step, of one image."""

import hashlib


def seed_of(*numbers: int) -> int:
    """One seed of 32 bits from several numbers, without the collisions of a sum.

    Torch's generator on the CPU takes no more than these 32 bits of a seed: numbers in upper bits would be lost.
    """
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:4], "big")
