"""A model of torch as a `lib.network.Network`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from lib.network import Network
from lib.system.device import device_of


@dataclass(frozen=True)
class TorchNetwork(Network):
    """A model in eval mode, on its device. amp: compute in bfloat16 where that is safe."""

    model: nn.Module
    amp: bool = False

    modalities = property(lambda self: self.model.modalities)
    n_classes = property(lambda self: self.model.n_classes)
    dim = property(lambda self: self.model.dim)
    divisor = property(lambda self: self.model.divisor)

    def usual_batch(self, patch_size: tuple[int, ...]) -> int:
        """8 in 2D; 2 in 3D or on the CPU, where more gain nothing and need memory."""
        return 2 if len(patch_size) == 3 or device_of(self.model).type == "cpu" else 8

    def __call__(self, patches: np.ndarray) -> np.ndarray:
        return self._maps(torch.from_numpy(np.ascontiguousarray(patches)).to(device_of(self.model))).cpu().numpy()

    def mean(self, patches: np.ndarray, mirrorings: Sequence[tuple[int, ...]], batch_size: int) -> np.ndarray:
        """As `Network.mean`, on the device, so that only patches and means travel."""
        patches = torch.from_numpy(np.ascontiguousarray(patches)).to(device_of(self.model))
        mirrored = torch.cat([patches.flip(axes) for axes in mirrorings])
        outputs = torch.cat([self._maps(part) for part in mirrored.split(batch_size)])
        outputs = outputs.unflatten(0, (len(mirrorings), -1))  # (mirrorings, B, n_classes, *patch)
        mean = sum(output.flip(axes) for output, axes in zip(outputs, mirrorings, strict=True)) / len(mirrorings)
        return mean.cpu().numpy()

    @torch.inference_mode()
    def _maps(self, patches: Tensor) -> Tensor:
        with torch.autocast(patches.device.type, torch.bfloat16, enabled=self.amp):
            return self.model(patches)[0].float()

    def trial(self, patch_size: tuple[int, ...], batch_size: int) -> Callable[[bool], object]:
        """What takes the time of a prediction: one batch of empty patches, as a function of `amp`."""
        patches = np.zeros((batch_size, self.modalities, *patch_size), np.float32)
        return lambda amp: replace(self, amp=amp)(patches)
