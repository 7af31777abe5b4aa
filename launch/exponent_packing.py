"""bf16 values in 12 bits without loss: what launch/measure_packing.py measures. No cache is stored so.

Sign and mantissa stay as they are, a byte a value. Of the exponents of a group 16 consecutive ones are written in 4
bits; values of any other exponent (zeros, infinities and NaN among them) are listed as they are. G groups of n values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

NUM_EXPONENTS = 16
SLICE = 1 << 14
"""Values that pass through all steps together, within a processor's fast caches."""


@dataclass(slots=True)
class Packed:
    """Value i of a group: byte i of its plane; the low half of its nibble byte i, or from n / 2 on the high half."""

    plane: np.ndarray  # uint8 [G, n]: sign and mantissa
    nibbles: np.ndarray  # uint8 [G, n / 2]: exponent - first
    first: np.ndarray  # uint8 [G]
    positions: np.ndarray  # uint32 [E], in the order of all values: of the exceptions
    exceptions: np.ndarray  # uint16 [E]

    @property
    def num_bytes(self) -> int:
        return sum(part.nbytes for part in (self.plane, self.nibbles, self.first, self.positions, self.exceptions))


def exponents_of(bits: np.ndarray) -> np.ndarray:
    """Of bf16 values, given as their bits (uint16): uint8."""
    return (bits >> 7).astype(np.uint8)


def pack(bits: np.ndarray) -> Packed:
    """Values [G, n] as their bits (uint16); n is even."""
    exponents = exponents_of(bits)
    first = np.array([_best_first(row) for row in exponents], dtype=np.uint8)
    offsets = exponents - first[:, None]  # of lower exponents it wraps around
    positions = np.flatnonzero(offsets >= NUM_EXPONENTS).astype(np.uint32)
    low, high = np.split(offsets & 15, 2, axis=1)
    plane = (bits >> 8 & 0x80 | bits & 0x7F).astype(np.uint8)
    return Packed(plane, low | high << 4, first, positions, bits.reshape(-1)[positions])


def _best_first(exponents: np.ndarray) -> int:
    """Of the NUM_EXPONENTS consecutive ones that most values have."""
    counts = np.bincount(exponents, minlength=256)
    return int(np.convolve(counts, np.ones(NUM_EXPONENTS, dtype=np.int64), mode="valid").argmax())


def unpack(packed: Packed, out: np.ndarray) -> None:
    """Writes the bits (uint16) of all values to `out` [G, n]."""
    half = out.shape[1] // 2
    exponents, signs = np.empty((2, min(SLICE, half)), dtype=np.uint16)
    for group, row in enumerate(out):
        base = np.uint16(packed.first[group]) << 7
        for start in range(0, half, SLICE):
            nibbles = packed.nibbles[group, start : start + SLICE]
            size = len(nibbles)
            # Shifted to where a bf16 has its exponent: by 7, the high half by 3.
            for begin, shift in ((start, 7), (half + start, 3)):
                _join(nibbles, shift, base, packed.plane[group, begin : begin + size], row[begin:], exponents, signs)
    out.reshape(-1)[packed.positions] = packed.exceptions


def _join(nibbles, shift, base, plane, out, exponents, signs) -> None:
    """Of one slice; `exponents` and `signs` are memory to work in."""
    size = len(nibbles)
    exponents, signs, out = exponents[:size], signs[:size], out[:size]
    np.left_shift(nibbles, shift, out=exponents, dtype=np.uint16)
    np.bitwise_and(exponents, 15 << 7, out=exponents)
    np.add(exponents, base, out=exponents)
    np.copyto(signs, plane)
    np.left_shift(signs, 8, out=out)
    np.bitwise_or(out, signs, out=out)
    np.bitwise_and(out, 0x807F, out=out)
    np.bitwise_or(out, exponents, out=out)
