"""Data sets, and loaders that make reproducible batches of them."""

from clicktrain.data.catalogue import load, names
from clicktrain.data.dataset import DataSet
from clicktrain.data.loader import Loader
from clicktrain.data.splits import ArraySplit, Draw, Split
from clicktrain.data.streaming import FolderSplit

__all__ = ["ArraySplit", "DataSet", "Draw", "FolderSplit", "Loader", "Split", "load", "names"]
