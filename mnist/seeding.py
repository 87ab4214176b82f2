"""Seeds as pure functions of what they are for, so that no hidden random state exists that a restart could lose.

In: a run's seed and the coordinates of one draw (purpose, epoch, step, rank ...). Out: a 63-bit seed.
"""

from __future__ import annotations

import zlib

_MASK = (1 << 64) - 1


def derive_seed(seed: int, purpose: str, *coordinates: int) -> int:
    """Mixes its arguments into one seed, in [0, 2**63).

    Neighbouring arguments give unrelated seeds: run 7 in epoch 1 shares nothing with run 8 in epoch 0, as it would if
    seeds were simply added.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood 2014), applied to one argument after the other.
    """
    state = seed & _MASK
    for value in (zlib.crc32(purpose.encode()), *coordinates):
        state = _splitmix64(state ^ _splitmix64(value & _MASK))
    return state >> 1


def _splitmix64(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)
