"""What every method passes: it trains, its networks move, it continues exactly from a checkpoint, and it refuses bad settings."""

from __future__ import annotations

import abc
import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from raysseg.core import checkpoint
from raysseg.core.algorithm import SegmentationAlgorithm
from raysseg.core.config import SegmentationConfig
from raysseg.core.modules import SEGMENTER
from raysseg.core.settings import MethodSettings
from raysseg.errors import InputError
from raysseg.segmenters import upsample_logits


def weights_of(algorithm: SegmentationAlgorithm) -> dict[str, torch.Tensor]:
    """Returns copies of all tensors of all modules of the learner."""
    (module,) = algorithm.learner_group.foreach_learner(lambda learner: learner.module)
    networks = module.get()
    tensors = {}
    for part in networks.keys():  # noqa: SIM118  (a MultiRLModule iterates over pairs)
        tensors |= {f"{part}.{name}": value.clone() for name, value in networks[part].state_dict().items()}
    return tensors


def numbers_of(record: dict[str, Any]) -> list[float]:
    """Returns all numbers of a record, those in lists too."""
    values = [value for value in record.values() if not isinstance(value, str)]
    flat = [part for value in values for part in (value if isinstance(value, list) else [value])]
    return [float(value) for value in flat if value is not None]


class MethodTester(abc.ABC):
    """Sub-class it as `Test<Method>`; pytest then runs everything here for the method, in serial mode.

    `settings` makes small settings (dotted keys with `__`); `config` is the method's RLlib configuration; `networks` are the
    prefixes of what training must move; `save_after` the iterations whose checkpoints are continued; `bad_settings` what is
    refused, and by which words.
    """

    config: type[SegmentationConfig]
    networks: tuple[str, ...] = (f"{SEGMENTER}.online", f"{SEGMENTER}.teacher")
    save_after: tuple[int, ...]
    bad_settings: tuple[tuple[dict[str, Any], str], ...]

    @classmethod
    @abc.abstractmethod
    def settings(cls, **changes: Any) -> MethodSettings:
        """Makes small settings of the method, one update per iteration."""

    @classmethod
    def exported(cls, algorithm: Any) -> torch.nn.Module:
        """Returns what predicts after a run, in evaluation mode on the CPU."""
        return algorithm.export_module().online.eval()

    @classmethod
    def build(cls, folder: Path, store_uri: str, **changes: Any) -> SegmentationAlgorithm:
        """Builds the method's algorithm."""
        algorithm = cls.config().apply(cls.settings(**changes), run_dir=str(folder), store_uri=store_uri).build_algo()
        assert isinstance(algorithm, SegmentationAlgorithm)
        return algorithm

    @pytest.fixture(scope="class")
    @classmethod
    def reference(
        cls, tmp_path_factory: pytest.TempPathFactory, store_uri: str, ray_session: None
    ) -> Iterator[dict[str, Any]]:
        """A run to the end, with checkpoints on the way."""
        folder = tmp_path_factory.mktemp("reference")
        algorithm = cls.build(folder, store_uri)
        before, records = weights_of(algorithm), []
        while not algorithm.done:
            left = algorithm.iterations_left()
            algorithm.train()
            records.append(copy.deepcopy(algorithm.record))
            assert algorithm.done or algorithm.iterations_left() == left - 1, records[-1]
            if algorithm.iteration in cls.save_after:
                checkpoint.save(algorithm, folder / "checkpoints", keep=len(cls.save_after))
        labels = {number: algorithm.label_store.table(number) for number in algorithm.label_store.versions()}
        yield {
            "folder": folder,
            "algorithm": algorithm,
            "records": records,
            "before": before,
            "after": weights_of(algorithm),
            "labels": labels,
        }
        algorithm.stop()

    def test_every_number_is_finite(self, reference: dict[str, Any]) -> None:
        for record in reference["records"]:
            assert all(math.isfinite(number) for number in numbers_of(record)), record

    def test_every_network_moves(self, reference: dict[str, Any]) -> None:
        before, after = reference["before"], reference["after"]
        for prefix in self.networks:
            names = [name for name in before if name.startswith(f"{prefix}.") and before[name].is_floating_point()]
            assert names, f"there is no network {prefix}"
            moved = [name for name in names if not torch.equal(before[name], after[name])]
            assert len(moved) > 0.9 * len(names), f"{prefix}: only {moved} moved"

    def test_the_run_ends_with_a_score(self, reference: dict[str, Any]) -> None:
        last, algorithm = reference["records"][-1], reference["algorithm"]
        assert last["phase"] == "evaluate"
        assert 0 <= last["miou"] <= 1
        assert last["images"] == len(algorithm.store.keys(algorithm.settings.data.val_split))
        assert len(last["per_class_iou"]) == algorithm.store.info.num_classes

    def test_the_exported_segmenter_predicts_what_was_scored(self, reference: dict[str, Any]) -> None:
        algorithm = reference["algorithm"]
        network = self.exported(algorithm)
        right, total = 0, 0
        for key in algorithm.store.keys(algorithm.settings.data.val_split):
            image, label = np.array(algorithm.store.image(key)), np.array(algorithm.store.label(key))
            mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
            pixels = torch.tensor((image / 255 - mean) / deviation, dtype=torch.float32).permute(2, 0, 1)[None]
            with torch.no_grad():
                predicted = upsample_logits(network(pixels).logits, label.shape).argmax(1)[0].numpy()
            right += int((predicted == label)[label < 254].sum())
            total += int((label < 254).sum())
        assert right / total == pytest.approx(reference["records"][-1]["pixel_accuracy"], abs=1e-3)

    def test_a_finished_run_stays_as_it_is(self, reference: dict[str, Any]) -> None:
        algorithm = reference["algorithm"]
        algorithm.training_step()
        assert algorithm.done
        after = weights_of(algorithm)
        assert all(torch.equal(after[name], value) for name, value in reference["after"].items())

    def test_a_checkpoint_continues_bit_identically(self, reference: dict[str, Any], store_uri: str) -> None:
        for iteration in self.save_after:
            folder = reference["folder"]
            algorithm = self.build(folder, store_uri)
            try:
                checkpoint.restore(algorithm, folder / "checkpoints" / f"{iteration:08d}")
                assert algorithm.iteration == iteration
                while not algorithm.done:
                    algorithm.train()
                    expected = reference["records"][algorithm.iteration - 1]
                    assert algorithm.record == expected, f"continued after iteration {iteration}"
                assert algorithm.iteration == len(reference["records"])
                for name, value in weights_of(algorithm).items():
                    assert torch.equal(value, reference["after"][name]), f"{name}, continued after {iteration}"
                assert algorithm.label_store.versions() == list(reference["labels"])
                for number, table in reference["labels"].items():
                    assert algorithm.label_store.table(number).equals(table)
            finally:
                algorithm.stop()

    def test_bad_settings_are_refused_in_one_sentence(self) -> None:
        for changes, words in self.bad_settings:
            with pytest.raises(InputError, match=words) as error:
                self.settings(**changes)
            assert "\n" not in str(error.value)

    def test_bad_weights_are_refused_before_anything_starts(
        self, tmp_path: Path, store_uri: str, ray_session: None
    ) -> None:
        (tmp_path / "broken.pth").write_bytes(b"no weights")
        for path in (tmp_path / "broken.pth", tmp_path / "absent.pth"):
            config = self.config().apply(
                self.settings(segmenter__weights=str(path)), run_dir=str(tmp_path / "run"), store_uri=store_uri
            )
            with pytest.raises(InputError, match=path.name):
                config.segmenter_spec().build()
