"""How dense weights travel: whole, as what changed since the base, or not at all. Always to the same bits.

| how | bytes |
|---|---|
| `plain` | the numbers, float32, little-endian |
| `same` | none: they are the base's |
| `xor_zstd` | the bits that differ from the base's, first bytes of all numbers first, compressed by zstd |

A step changes nearly all dense weights by little. What stays are sign, exponent and first bits, so most of what differs
lies in the last bytes: told apart by bytes, the others are nearly all zero.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from headrace.contract.errors import InvariantBroken

Dense = Mapping[str, npt.NDArray[np.float32]]
Bits = npt.NDArray[np.uint32]
PLAIN, SAME, XOR_ZSTD = "plain", "same", "xor_zstd"
_CODEC = pa.Codec("zstd", compression_level=1)


class WrongBase(InvariantBroken):
    """A change was put onto other dense weights than it was made from."""


class DenseChange(msgspec.Struct, frozen=True):
    """Dense weights as they travel."""

    how: str
    data: bytes
    shapes: dict[str, list[int]]
    sha256: str
    """Of the whole numbers as they are afterwards, in hex."""

    def bits(self, base_N: Bits | None = None) -> Bits:
        """Return all numbers as bits: uint32 [N].

        Args:
            base_N: those of the version that the change was made from; `plain` needs none.

        Raises:
            WrongBase: the base is another one than the change was made from.
            InvariantBroken: the bytes are not what `how` and `shapes` promise.
        """
        count = sum(math.prod(shape) for shape in self.shapes.values())
        if self.how == PLAIN:
            return self._checked(np.frombuffer(self.data, "<u4") if len(self.data) == 4 * count else None, count)
        if self.how not in (SAME, XOR_ZSTD):
            raise InvariantBroken(
                f"dense weights travel as {self.how!r}, which is not known here: update this process."
            )
        if base_N is None or len(base_N) != count:
            raise WrongBase(
                f"a change of {count} dense weights has a base of {0 if base_N is None else len(base_N)}: "
                "it is for another model."
            )
        if self.how == SAME:
            changed_N = base_N
        else:
            try:
                mixed = np.frombuffer(_CODEC.decompress(self.data, 4 * count, asbytes=True), np.uint8)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise InvariantBroken(f"{len(self.data)} bytes of dense weights cannot be read: {error}") from error
            changed_N = base_N ^ np.ascontiguousarray(mixed.reshape(4, count).T).view("<u4").reshape(-1)
        if sha256_of(changed_N) != self.sha256:
            raise WrongBase("dense weights are not those of the change once it is applied: the base was another.")
        return changed_N

    def _checked(self, bits_N: Bits | None, count: int) -> Bits:
        if bits_N is None:
            raise InvariantBroken(f"{len(self.data)} bytes of dense weights for shapes of {count} numbers.")
        if sha256_of(bits_N) != self.sha256:
            raise InvariantBroken("dense weights do not match their digest.")
        return bits_N

    def dense(self, base_N: Bits | None = None) -> dict[str, npt.NDArray[np.float32]]:
        """Return the weights by name; see `bits`."""
        bits_N, out, at = self.bits(base_N), {}, 0
        for name, shape in self.shapes.items():
            count = math.prod(shape)
            out[name] = bits_N[at : at + count].view("<f4").reshape(shape)
            at += count
        return out


def change_of(dense: Dense, base_N: Bits | None = None) -> tuple[DenseChange, Bits]:
    """Return the weights as they travel, and all their bits: uint32 [N].

    Args:
        base_N: the bits of the version that the receiver has; None: it has none.
    """
    shapes = {name: list(array.shape) for name, array in dense.items()}
    bits_N = bits_of(dense)
    sha256 = sha256_of(bits_N)
    if base_N is not None and len(base_N) == len(bits_N):
        mixed_N = bits_N ^ base_N
        if not mixed_N.any():
            return DenseChange(SAME, b"", shapes, sha256), bits_N
        by_byte = np.ascontiguousarray(mixed_N.view(np.uint8).reshape(-1, 4).T)
        data = _CODEC.compress(by_byte, asbytes=True)
        if len(data) < bits_N.nbytes:
            return DenseChange(XOR_ZSTD, data, shapes, sha256), bits_N
    return DenseChange(PLAIN, bits_N.tobytes(), shapes, sha256), bits_N


def bits_of(dense: Dense) -> Bits:
    """Return all weights one after another as bits: uint32 [N]."""
    parts = [np.ascontiguousarray(array, "<f4").reshape(-1) for array in dense.values()]
    return np.concatenate([np.empty(0, "<f4"), *parts]).view("<u4")


def sha256_of(bits_N: Bits) -> str:
    """Return SHA-256 of the numbers, in hex."""
    return hashlib.sha256(np.ascontiguousarray(bits_N, "<u4").data).hexdigest()
