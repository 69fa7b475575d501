"""The segmenter as an RLModule: the online network that the learner trains and the teacher that follows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ray.rllib.core.rl_module.torch import TorchRLModule

from raysseg.configuration import load_settings
from raysseg.errors import InputError
from raysseg.segmenters import SegmenterSettings, build_segmenter, make_teacher, save_segmenter

SEGMENTER = "segmenter"
"""The module id of the segmenter in every method's MultiRLModule."""


class SegmenterModule(TorchRLModule):
    """Online segmenter Φ and teacher Φ̄ (EIL, Eq. 13: a moving average of the segmenters of previous epochs).

    `model_config` carries `segmenter` (its settings as plain values), `num_classes`, `seed` and `pretrained` (a folder or None).
    An `inference_only` module takes its weights from the learner and reads no weights file.
    """

    def setup(self) -> None:
        """Builds both networks."""
        config: dict[str, Any] = dict(self.model_config)
        settings = load_settings(SegmenterSettings, config["segmenter"], where="the segmenter's settings")
        torch.manual_seed(int(config["seed"]))
        if self.inference_only:
            settings = settings.model_copy(update={"weights": "none"})
        folder = config["pretrained"]
        if folder is None or self.inference_only:
            self.online = build_segmenter(settings, config["num_classes"])
            self.teacher = make_teacher(self.online)
            return
        for name in ("online", "teacher"):
            path = Path(folder) / f"{name}.safetensors"
            if not path.is_file():
                raise InputError(f"training.pretrained is {folder}, but the file {path.name} is not in that folder.")
            network = build_segmenter(settings.model_copy(update={"weights": str(path)}), config["num_classes"])
            setattr(self, name, network)
        self.teacher.requires_grad_(False).eval()

    def export(self, folder: Path) -> None:
        """Writes `online.safetensors` and `teacher.safetensors` into a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_segmenter(folder / "online.safetensors", self.online)
        save_segmenter(folder / "teacher.safetensors", self.teacher)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """RLlib's generic forward: `obs` `[B, 3, H, W]` normalised images to `logits` `[B, K, h, w]`."""
        return {"logits": self.online(batch["obs"]).logits}
