"""Readers of public formats: a plain folder, CamVid, Cityscapes, PASCAL VOC 2012 with scribbles."""

from raysseg.data.readers.camvid import CamvidReader
from raysseg.data.readers.cityscapes import CityscapesReader
from raysseg.data.readers.folder import FolderReader, FolderSettings
from raysseg.data.readers.images import Reader, SampleFiles
from raysseg.data.readers.voc import VocReader, VocSettings

__all__ = [
    "CamvidReader",
    "CityscapesReader",
    "FolderReader",
    "FolderSettings",
    "Reader",
    "SampleFiles",
    "VocReader",
    "VocSettings",
]
