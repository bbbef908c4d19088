"""What an autoencoder of latents needs beside a run (`--vae`): counted of the published one, sd-vae-ft-mse."""

from __future__ import annotations

from dataclasses import dataclass

from ipfm.models import NetworkConfig
from ipfm.models.autoencoder import AT_ONCE, is_latent

# Of the published one: parameters in float32, pixels a side of a picture for each of a latent.
PARAMETERS = 83_653_863
FACTOR = 8
# Live bytes for each pixel of a picture at the peak of decoding: 256 channels of full size in float32, three times.
DECODED = 3 * 256 * 4


@dataclass(frozen=True)
class AutoencoderBytes:
    """Bytes on the device of an autoencoder in float32."""

    pictures: int
    """That are decoded at a time."""
    side: int
    """Of a picture, in pixels."""
    weights: int
    """There at all times, beside what is planned of the run."""
    decoding: int
    """While pictures are decoded, between the steps: beside the run's permanent state, without a step's activations."""

    def peak(self, state: int, peak: int) -> int:
        """Bytes at the peak of a run with it.

        Args:
            state: the run's permanent state.
            peak: at the peak of its steps.
        """
        return self.weights + max(peak, state + self.decoding)


def autoencoder_bytes(network: NetworkConfig) -> AutoencoderBytes | None:
    """What `--vae` needs for the images of a network; None where these are no latents.

    Args:
        network: the teacher's architecture, or the network's that is trained.
    """
    if not is_latent(network.image_shape):
        return None
    channels, height, width = network.image_shape
    pixels = FACTOR**2 * height * width
    decoding = AT_ONCE * (DECODED * pixels + 4 * channels * height * width)
    return AutoencoderBytes(AT_ONCE, FACTOR * width, 4 * PARAMETERS, decoding)
