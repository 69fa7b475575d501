"""Synthetic scenes: reproducible, with shared colours, honest masks and every kind of supervision."""

from __future__ import annotations

import numpy as np
import pytest

from raysseg.data.sample import Sample
from raysseg.data.scribbles import ScribbleSettings
from raysseg.data.synthetic import CLASS_NAMES, SyntheticSettings, synthetic_info, synthetic_sample, synthetic_samples


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return list(synthetic_samples(SyntheticSettings(train_images=40, val_images=10)))


def test_shapes_keys_and_splits(samples: list[Sample]) -> None:
    assert [s.key for s in samples] == [f"train-{i:05d}" for i in range(40)] + [f"val-{i:05d}" for i in range(10)]
    for sample in samples:
        assert sample.image.shape == (96, 96, 3)
        assert sample.image.dtype == np.uint8
        assert sample.label is not None
        assert sample.label.shape == (96, 96)
        assert sample.key.startswith(sample.split)


def test_a_scene_depends_on_its_key_and_seed_only() -> None:
    settings = SyntheticSettings()
    one = synthetic_sample(settings, "val", 3, ScribbleSettings())
    again = list(synthetic_samples(SyntheticSettings(val_images=4, train_images=1), splits=("val",)))[3]
    assert np.array_equal(one.image, again.image)
    assert np.array_equal(one.scribble, again.scribble)
    other_seed = synthetic_sample(SyntheticSettings(seed=1), "val", 3, ScribbleSettings())
    other_split = synthetic_sample(settings, "train", 3, ScribbleSettings())
    assert not np.array_equal(one.image, other_seed.image)
    assert not np.array_equal(one.image, other_split.image)


def test_every_class_occurs_in_unequal_shares(samples: list[Sample]) -> None:
    counts = sum(np.bincount(s.label.ravel(), minlength=5) for s in samples if s.label is not None)
    shares = counts / counts.sum()
    assert len(shares) == len(CLASS_NAMES) == synthetic_info().num_classes
    assert 0.5 < shares[0] < 0.75
    assert shares.min() > 0.02
    assert shares[1:].max() > 2 * shares[1:].min()


def test_colour_does_not_decide_the_class(samples: list[Sample]) -> None:
    """The nearest class-mean colour is hardly better than guessing the most frequent class of the foreground."""
    pixels = np.concatenate([s.image.reshape(-1, 3) for s in samples]).astype(float)
    labels = np.concatenate([s.label.ravel() for s in samples if s.label is not None])
    objects = labels > 0
    pixels, labels = pixels[objects], labels[objects]
    means = np.stack([pixels[labels == k].mean(0) for k in range(1, 5)])
    guess = 1 + ((pixels[:, None] - means) ** 2).sum(-1).argmin(1)
    recall = np.mean([(guess[labels == k] == k).mean() for k in range(1, 5)])
    assert recall < 0.4


def test_scribbles_tags_and_expressions_agree_with_the_label(samples: list[Sample]) -> None:
    texts = set()
    for sample in samples:
        assert sample.label is not None
        assert sample.scribble is not None
        drawn = sample.scribble != 255
        assert (sample.scribble[drawn] == sample.label[drawn]).all()
        assert set(np.unique(sample.scribble[drawn])) == set(np.unique(sample.label))
        assert sample.tags == tuple(k for k in np.unique(sample.label) if k)
        assert len({e.text for e in sample.expressions}) == len(sample.expressions)
        for expression in sample.expressions:
            name = expression.text.split()[-1]
            assert expression.mask.dtype == bool
            assert expression.mask.sum() >= 25
            assert (sample.label[expression.mask] == CLASS_NAMES.index(name)).all()
            texts.add(expression.text)
    assert {"the left disc", "the large box"} <= texts


def test_left_and_large_mean_what_they_say(samples: list[Sample]) -> None:
    compared = 0
    for sample in samples:
        masks = {e.text: e.mask for e in sample.expressions}
        for name in CLASS_NAMES[1:]:
            left, right = masks.get(f"the left {name}"), masks.get(f"the right {name}")
            large, small = masks.get(f"the large {name}"), masks.get(f"the small {name}")
            if left is not None and right is not None:
                assert np.nonzero(left)[1].min() < np.nonzero(right)[1].max()
                compared += 1
            if large is not None and small is not None:
                assert large.sum() > 1.4 * small.sum()
                compared += 1
    assert compared > 5


def test_settings_take_effect() -> None:
    base = SyntheticSettings()
    plain: np.ndarray = synthetic_sample(base, "train", 0, ScribbleSettings()).image.astype(float)
    for change in ({"noise": 60.0}, {"illumination": 0.9}, {"objects": 20}):
        changed = synthetic_sample(base.model_copy(update=change), "train", 0, ScribbleSettings()).image
        assert np.abs(changed - plain).mean() > 3, change
    assert synthetic_sample(SyntheticSettings(height=64, width=128), "train", 0, ScribbleSettings()).image.shape == (
        64,
        128,
        3,
    )
