"""NetworkConfig: what it accepts, what it refuses and how it travels through JSON."""

import json
import math
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from ipfm.models import NetworkConfig

BASE = {"img_resolution": 16, "img_channels": 3}


def test_defaults_and_normalisation():
    config = NetworkConfig(
        img_resolution=np.int64(16), img_channels=3, channel_mult=[1, 2], resample_filter=[1, 1], sigma_max=80, D=128
    )
    assert type(config.img_resolution) is int and config.channel_mult == (1, 2)
    assert type(config.sigma_max) is float and type(config.D) is float
    assert config.resample_filter == (1.0, 1.0)
    assert math.inf == NetworkConfig(**BASE).D
    assert hash(config) == hash(replace(config))
    with pytest.raises(FrozenInstanceError):
        config.D = 64.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"img_resolution": "16"}, r"img_resolution must be a whole number of at least 1, got '16'"),
        ({"img_resolution": 16.0}, "img_resolution must be a whole number"),
        ({"img_resolution": 0}, "at least 1, got 0"),
        ({"img_resolution": 12}, r"12 cannot be halved 3 times .* possible: multiples of 8"),
        ({"img_channels": True}, "img_channels must be a whole number"),
        ({"label_dim": -1}, "label_dim must be a whole number of at least 0, got -1"),
        ({"augment_dim": -1}, "augment_dim must be"),
        ({"num_blocks": 0}, "num_blocks must be"),
        ({"use_fp16": 1}, "use_fp16 must be True or False, got 1"),
        ({"sigma_min": -0.1}, "sigma_min must be a finite number of at least 0, got -0.1"),
        ({"sigma_min": math.inf}, "sigma_min must be a finite number"),
        ({"sigma_max": 0.0}, "sigma_max must be above sigma_min 0.0, got 0.0"),
        ({"sigma_data": 0}, "sigma_data must be a finite number above 0"),
        ({"sigma_data": math.inf}, "sigma_data must be a finite number above 0"),
        ({"D": 0}, "D must be a number above 0, or inf for diffusion, got 0.0"),
        ({"D": -1}, "D must be a number above 0"),
        ({"D": math.nan}, "D must be a number, got nan"),
        ({"D": "inf"}, "D must be a number, got 'inf'"),
        ({"D": True}, "D must be a number, got True"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
        ({"label_dropout": 1.5}, "label_dropout must be at least 0"),
        ({"dropout": None}, "dropout must be a number, got None"),
        ({"model_type": "UNet"}, "model_type 'UNet' is unknown; possible: SongUNet"),
        ({"embedding_type": "sine"}, "embedding_type 'sine' is unknown; possible: positional, fourier"),
        ({"encoder_type": "deep"}, "encoder_type 'deep' is unknown; possible: standard, skip, residual"),
        ({"decoder_type": "residual"}, "decoder_type 'residual' is unknown; possible: standard, skip"),
        ({"channel_mult": []}, "channel_mult must name at least one level"),
        ({"channel_mult": 2}, "channel_mult must be a sequence of numbers, got 2"),
        ({"channel_mult": "1,2"}, "channel_mult must be a sequence of numbers"),
        ({"channel_mult": (1, 0)}, r"channel_mult\[1\] must be a whole number of at least 1, got 0"),
        ({"attn_resolutions": (8.5,)}, r"attn_resolutions\[0\] must be a whole number"),
        ({"resample_filter": (1, "1")}, r"resample_filter\[1\] must be a number"),
        ({"resample_filter": (1, 2, 1)}, r"even number of taps such as \[1, 1\], got \[1.0, 2.0, 1.0\]"),
        ({"model_channels": 3}, r"even number of channels, at least 4, got 3"),
        ({"model_channels": 2}, r"at least 4, got 2"),
        ({"model_channels": 2, "channel_mult_noise": 2}, r"16x16_block0: GroupNorm cannot divide 2 channels"),
        ({"model_channels": 144}, r"16x16_block0: GroupNorm cannot divide 144 channels into 32 groups"),
        # Every block fits by itself; what the decoder concatenates, 72 + 72 channels, does not.
        ({"model_channels": 72, "channel_mult": (1,)}, r"16x16_block0: GroupNorm cannot divide 144 channels"),
    ],
)
def test_refusals_are_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        NetworkConfig(**{**BASE, **change})
    assert "\n" not in str(caught.value)


def test_json_round_trip():
    config = NetworkConfig(**BASE, label_dim=10, D=2048, resample_filter=(1, 3, 3, 1), dropout=0.13)
    for case in (config, replace(config, D=math.inf)):
        text = json.dumps(case.to_json(), allow_nan=False)
        assert NetworkConfig.from_json(json.loads(text)) == case
    assert NetworkConfig(**BASE).to_json()["D"] == "inf"
    assert NetworkConfig(**BASE).to_json()["channel_mult"] == [1, 2, 2, 2]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**BASE, "depth": 3}, "unknown key 'depth' in a network configuration; possible: img_resolution"),
        ({"img_resolution": 8}, "lacks the key 'img_channels'"),
        ({**BASE, "D": "128"}, "D must be a number, got '128'"),
        ({**BASE, "img_channels": "inf"}, "img_channels must be a whole number"),
        ([1, 2], "must be a JSON object, got list"),
    ],
)
def test_from_json_refusals(data, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig.from_json(data)
