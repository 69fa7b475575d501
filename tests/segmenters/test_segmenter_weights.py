"""Weights in files: read where they fit, refused in one sentence where they do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import torch
from safetensors.torch import load_file, save_file

from raysseg.errors import InputError
from raysseg.segmenters import Segmenter, SegmenterSettings, build_segmenter, load_weights, save_segmenter

MakeSettings = Callable[..., SegmenterSettings]


def test_given_encoder_weights_load_strictly(shared_data: Path, small_settings: MakeSettings) -> None:
    path = shared_data / "weights" / "resnet18_imagenet_to_layer3.safetensors"
    segmenter = build_segmenter(small_settings(weights=str(path)), 5)
    given = load_file(path)
    state = segmenter.encoder.state_dict()
    assert given.keys() == state.keys()
    assert all(torch.equal(state[name], given[name]) for name in given)
    with pytest.raises(InputError, match="of 115 expected tensors 25 are missing"):
        build_segmenter(small_settings(weights=str(path), encoder_depth=5), 5)


def test_encoder_files_of_other_programs(tmp_path: Path, segmenter: Segmenter, small_settings: MakeSettings) -> None:
    other = smp.encoders.get_encoder("resnet18", weights=None).state_dict()
    other["fc.weight"] = torch.zeros(1000, 512)
    counters = [name for name in other if name.endswith("num_batches_tracked")]
    for name in counters:
        del other[name]
    wrapped = {"epoch": 3, "state_dict": {f"module.encoder.{name}": value for name, value in other.items()}}
    torch.save(wrapped, tmp_path / "encoder.pth")
    load_weights(segmenter, tmp_path / "encoder.pth")
    assert torch.equal(segmenter.encoder_parameters()["layer3.1.conv2.weight"], other["layer3.1.conv2.weight"])

    timm_segmenter = build_segmenter(small_settings(encoder="tu-resnet18"), 3)
    load_weights(timm_segmenter, tmp_path / "encoder.pth")
    parameters = timm_segmenter.encoder_parameters()
    assert torch.equal(parameters["model.layer3.1.conv2.weight"], other["layer3.1.conv2.weight"])


def test_weights_of_another_network_are_refused(tmp_path: Path, segmenter: Segmenter) -> None:
    path = tmp_path / "other.safetensors"
    before = {name: value.clone() for name, value in segmenter.state_dict().items()}
    save_file(smp.encoders.get_encoder("mobilenet_v2", weights=None).state_dict(), path)
    with pytest.raises(
        InputError, match=r"other\.safetensors is not for the encoder resnet18: of 75 .* 75 are missing"
    ):
        load_weights(segmenter, path)
    wide = {name: value.clone() for name, value in segmenter.encoder.state_dict().items()}
    wide["conv1.weight"] = torch.zeros(64, 4, 7, 7)
    save_file(wide, path)
    with pytest.raises(InputError, match="0 are missing and 1 have another shape"):
        load_weights(segmenter, path)
    assert all(torch.equal(value, before[name]) for name, value in segmenter.state_dict().items())


def test_a_segmenter_of_other_settings_is_refused(
    tmp_path: Path, segmenter: Segmenter, small_settings: MakeSettings
) -> None:
    path = tmp_path / "segmenter.safetensors"
    save_segmenter(path, segmenter)
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "no temporary file is left"
    with pytest.raises(InputError, match="4 classes, expected 7"):
        build_segmenter(small_settings(weights=str(path)), 7)
    with pytest.raises(InputError, match="decoder_channels 32, expected 64"):
        build_segmenter(small_settings(weights=str(path), decoder_channels=64), 4)
    bare = tmp_path / "bare.pth"
    torch.save(segmenter.state_dict(), bare)
    with pytest.raises(
        InputError, match=r"bare\.pth is not for the segmenter .* 0 are missing and 2 have another shape"
    ):
        build_segmenter(small_settings(weights=str(bare)), 7)
    same = build_segmenter(small_settings(weights=str(bare), dropout=0.0), 4)
    assert all(torch.equal(value, same.state_dict()[name]) for name, value in segmenter.state_dict().items())


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pth", "empty.pth", "absent.pth", "list.pth", "w.npz"])
def test_unreadable_files_are_refused(tmp_path: Path, segmenter: Segmenter, name: str) -> None:
    path = tmp_path / name
    if name == "list.pth":
        torch.save([1, 2], path)
    elif name == "empty.pth":
        path.touch()
    elif name != "absent.pth":
        path.write_bytes(b"not what its name says" * 9)
    with pytest.raises(InputError, match=name):
        load_weights(segmenter, path)


def test_only_safetensors_are_written(tmp_path: Path, segmenter: Segmenter) -> None:
    with pytest.raises(InputError, match=r"not as .*segmenter\.pth"):
        save_segmenter(tmp_path / "segmenter.pth", segmenter)


def test_a_failed_download_names_the_alternatives(
    monkeypatch: pytest.MonkeyPatch, small_settings: MakeSettings
) -> None:
    def unreachable(*_args: object, **_kwargs: object) -> str:
        raise OSError("no connection")

    monkeypatch.setattr(smp.encoders, "hf_hub_download", unreachable)
    with pytest.raises(InputError, match=r"could not be had .*no connection.*set weights to 'none', or to the path"):
        build_segmenter(small_settings(weights="imagenet"), 3)


def test_an_encoder_without_imagenet_weights_is_refused() -> None:
    with pytest.raises(InputError, match="no ImageNet weights"):
        build_segmenter(SegmenterSettings(encoder="tu-coatnet_0_224"), 3)
