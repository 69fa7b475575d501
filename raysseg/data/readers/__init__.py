"""Readers of public formats: a plain folder, ADE20K, CamVid, Cityscapes, PASCAL Context, PASCAL VOC 2012 with scribbles."""

from raysseg.data.readers.ade20k import Ade20kReader
from raysseg.data.readers.camvid import CamvidReader
from raysseg.data.readers.cityscapes import CityscapesReader
from raysseg.data.readers.folder import FolderReader, FolderSettings
from raysseg.data.readers.images import Reader, SampleFiles
from raysseg.data.readers.pascal_context import PascalContextReader, PascalContextSettings
from raysseg.data.readers.voc import VocReader, VocSettings

__all__ = [
    "Ade20kReader",
    "CamvidReader",
    "CityscapesReader",
    "FolderReader",
    "FolderSettings",
    "PascalContextReader",
    "PascalContextSettings",
    "Reader",
    "SampleFiles",
    "VocReader",
    "VocSettings",
]
