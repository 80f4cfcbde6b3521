"""What a `lib.inference.Predictor` applies: something that turns patches into softmax maps, whatever computes them.
Without torch."""

from collections.abc import Sequence

import numpy as np

from lib.system.error import InputError


class Network:
    """A network in use."""

    modalities: int
    n_classes: int
    dim: str  # "2D" or "3D"
    divisor: tuple[int, ...]  # by axis: what the size of a patch must be a multiple of

    def usual_batch(self, patch_size: tuple[int, ...]) -> int:
        """How many such patches to compute at once: more would gain nothing, and need memory."""
        return 2

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        """Softmax maps (B, n_classes, *patch) float32 of patches (B, modalities, *patch) float32."""
        raise NotImplementedError

    def mean(self, patches: np.ndarray, mirrorings: Sequence[tuple[int, ...]], batch_size: int) -> np.ndarray:
        """Mean of the softmax maps over the mirrorings, each the axes of (B, modalities, *patch) that it flips; at most
        `batch_size` patches at once."""
        mirrored = np.concatenate([np.flip(patches, axes) for axes in mirrorings])
        parts = [self(mirrored[i : i + batch_size]) for i in range(0, len(mirrored), batch_size)]
        outputs = np.concatenate(parts) if len(parts) > 1 else parts[0]
        outputs = outputs.reshape(len(mirrorings), len(patches), *outputs.shape[1:])
        return sum(np.flip(output, axes) for output, axes in zip(outputs, mirrorings, strict=True)) / len(mirrorings)


def check_patch_size(patch_size: tuple[int, ...], divisor: tuple[int, ...]) -> None:
    """Raise InputError unless a network of this `divisor` can compute patches of this size."""
    if len(patch_size) != len(divisor) or any(n % d or n < 2 * d for n, d in zip(patch_size, divisor, strict=True)):
        least, twice = (" x ".join(map(str, dict.fromkeys(k * d for d in divisor))) for k in (1, 2))
        raise InputError(
            f"--patch_size {' '.join(map(str, patch_size))}: this model needs {len(divisor)} numbers, each a multiple "
            f"of {least} and at least {twice}"
        )
