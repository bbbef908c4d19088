"""NetworkConfig: what it accepts, what it refuses and how it travels through JSON."""

import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

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
        ({"num_blocks": -1}, "num_blocks must be"),
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
        ({"model_type": "UNet"}, "model_type 'UNet' is unknown; possible: SongUNet, DhariwalUNet"),
        ({"precond": "EDM"}, "precond 'EDM' is unknown; possible: EDMPrecond, VPPrecond, VEPrecond, iDDPMPrecond"),
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


VP, IDDPM = {"precond": "VPPrecond"}, {"precond": "iDDPMPrecond"}
ADM = {"model_type": "DhariwalUNet"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta_d": 20.0}, "beta_d is no option of EDMPrecond with SongUNet, got 20.0: .* it belongs to VPPrecond"),
        ({"M": 10}, "M is no option of EDMPrecond .* got 10: leave it out; it belongs to VPPrecond and iDDPMPrecond"),
        ({**VP, "C_1": 0.01}, "C_1 is no option of VPPrecond"),
        ({**VP, "sigma_data": 1}, "sigma_data is no option of VPPrecond"),
        ({**IDDPM, "epsilon_t": 0.01}, "epsilon_t is no option of iDDPMPrecond"),
        ({"precond": "VEPrecond", "beta_min": 1}, "beta_min is no option of VEPrecond"),
        ({**ADM, "embedding_type": "fourier"}, "embedding_type is no option of EDMPrecond with DhariwalUNet"),
        ({**ADM, "channel_mult_noise": 2}, "channel_mult_noise is no option"),
        ({**ADM, "encoder_type": "skip"}, "encoder_type is no option"),
        ({**ADM, "decoder_type": "skip"}, "decoder_type is no option"),
        ({**ADM, "resample_filter": (1, 3, 3, 1)}, r"resample_filter is no option .* got \(1.0, 3.0, 3.0, 1.0\)"),
        ({**VP, "sigma_min": 0.002}, "sigma_min of VPPrecond follows from its other options and is 0.000976562 here"),
        ({**IDDPM, "sigma_max": 80}, "sigma_max of iDDPMPrecond follows .* got 80: leave it out"),
        ({**VP, "beta_d": 0}, "beta_d must be a finite number above 0, got 0.0"),
        ({**VP, "beta_min": math.inf}, "beta_min must be a finite number above 0"),
        ({**VP, "epsilon_t": 1}, "epsilon_t must be above 0 and below 1, got 1.0"),
        ({**VP, "M": 1}, "M must be a whole number of at least 2, got 1"),
        ({**VP, "beta_d": 1e300}, "sigma_min must be a finite number of at least 0, got inf"),
        ({**IDDPM, "M": 10**9}, "M must be at most 100000, got 1000000000"),
        ({**IDDPM, "C_1": 0}, "C_1 must be above 0 and below 1"),
        ({**IDDPM, "C_2": -1}, "C_2 must be a finite number of at least 0"),
        ({**IDDPM, "C_2": 1e300}, "sigma_min must be a number, got nan"),
    ],
)
def test_options_of_other_classes_and_impossible_ones(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        NetworkConfig(**{**BASE, **change})
    assert "\n" not in str(caught.value)


def test_defaults_of_each_class():
    song, adm = NetworkConfig(**BASE), NetworkConfig(**BASE, **ADM)
    names = ("model_channels", "channel_mult", "num_blocks", "attn_resolutions")
    assert [getattr(song, name) for name in names] == [128, (1, 2, 2, 2), 4, (16,)]
    assert [getattr(adm, name) for name in names] == [192, (1, 2, 3, 4), 3, (32, 16, 8)]
    assert (song.sigma_min, song.sigma_max) == (0, math.inf)
    ve, vp = NetworkConfig(**BASE, precond="VEPrecond"), NetworkConfig(**BASE, **VP)
    assert (ve.sigma_min, ve.sigma_max) == (0.02, 100)
    assert (vp.beta_d, vp.beta_min, vp.epsilon_t, vp.M) == (19.9, 0.1, 1e-5, 1000)
    assert (vp.C_1, vp.C_2) == (0.001, 0.008)
    assert song.out_channels == vp.out_channels == 3 and NetworkConfig(**BASE, **IDDPM).out_channels == 6


def test_left_out_none_and_the_default_itself_are_equal():
    for classes in ({}, ADM, {"precond": "VEPrecond"}, VP, IDDPM):
        config = NetworkConfig(**BASE, **classes)
        spelled = {name: getattr(config, name) for name in ("model_channels", "channel_mult", "sigma_min", "sigma_max")}
        assert NetworkConfig(**BASE, **classes, **spelled) == config
        unspelled = dict.fromkeys(spelled)
        assert NetworkConfig(**BASE, **classes, **unspelled) == config
        assert hash(replace(config)) == hash(config) and replace(config) == config
        assert replace(config, dropout=0.3).dropout == 0.3
    assert NetworkConfig(**BASE) != NetworkConfig(**BASE, precond="VEPrecond", sigma_min=0, sigma_max=math.inf)


def test_replacing_what_others_follow_from():
    vp = NetworkConfig(**BASE, **VP)
    with pytest.raises(ValueError, match=r"sigma_max of VPPrecond follows .* leave it out \(None\)"):
        replace(vp, beta_d=10.0)
    assert replace(vp, beta_d=10.0, sigma_min=None, sigma_max=None).sigma_max < 30
    sizes = dict.fromkeys(("model_channels", "channel_mult", "num_blocks", "attn_resolutions"))
    assert replace(NetworkConfig(**BASE), model_type="DhariwalUNet", **sizes) == NetworkConfig(**BASE, **ADM)
    kept = replace(NetworkConfig(**BASE), model_type="DhariwalUNet")
    assert (kept.model_channels, kept.num_blocks) == (128, 4)


def test_json_round_trip():
    config = NetworkConfig(**BASE, label_dim=10, D=2048, resample_filter=(1, 3, 3, 1), dropout=0.13)
    others = [NetworkConfig(**BASE, **case) for case in (ADM, VP, {**VP, **ADM, "beta_d": 3}, {**IDDPM, "M": 9})]
    others += [NetworkConfig(**BASE, precond="VEPrecond", sigma_min=0.5)]
    for case in (config, replace(config, D=math.inf), *others):
        text = json.dumps(case.to_json(), allow_nan=False)
        assert NetworkConfig.from_json(json.loads(text)) == case
    assert NetworkConfig(**BASE).to_json()["D"] == "inf"
    assert NetworkConfig(**BASE).to_json()["channel_mult"] == [1, 2, 2, 2]


def test_json_holds_the_fields_of_the_classes():
    common = {"img_resolution", "img_channels", "label_dim", "use_fp16", "model_type", "augment_dim", "model_channels"}
    common |= {"channel_mult", "channel_mult_emb", "num_blocks", "attn_resolutions", "dropout", "label_dropout", "D"}
    common |= {"precond"}
    song = {"embedding_type", "channel_mult_noise", "encoder_type", "decoder_type", "resample_filter"}
    own = {
        "EDMPrecond": {"sigma_min", "sigma_max", "sigma_data"},
        "VEPrecond": {"sigma_min", "sigma_max"},
        "VPPrecond": {"beta_d", "beta_min", "epsilon_t", "M"},
        "iDDPMPrecond": {"M", "C_1", "C_2"},
    }
    for precond, options in own.items():
        assert set(NetworkConfig(**BASE, precond=precond).to_json()) == common | options | song
        assert set(NetworkConfig(**BASE, precond=precond, **ADM).to_json()) == common | options


@pytest.mark.parametrize("name", ["edm_ddpmpp_uncond", "edm_ncsnpp_uncond"])
def test_configurations_from_before_there_were_other_classes(name):
    data = json.loads((Path(__file__).parents[1] / "fixtures" / name / "config.json").read_text())["network"]
    assert "precond" not in data
    config = NetworkConfig.from_json(data)
    assert (config.precond, config.model_type) == ("EDMPrecond", "SongUNet")
    assert config.to_json() == {**data, "precond": "EDMPrecond"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({**BASE, "depth": 3}, "unknown key 'depth' in a network configuration; possible: img_resolution"),
        ({"img_resolution": 8}, "lacks the key 'img_channels'"),
        ({**BASE, "D": "128"}, "D must be a number, got '128'"),
        ({**BASE, "sigma_min": "inf"}, "sigma_min must be a number, got 'inf'"),
        ({**BASE, "img_channels": "inf"}, "img_channels must be a whole number"),
        ([1, 2], "must be a JSON object, got list"),
    ],
)
def test_from_json_refusals(data, message):
    with pytest.raises(ValueError, match=message):
        NetworkConfig.from_json(data)
