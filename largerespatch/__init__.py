"""Stable Diffusion pipelines at resolutions far beyond what memory and time allow otherwise."""

from importlib.metadata import PackageNotFoundError, version

from .patch import LargeResPatch
from .view import viewBricks

__all__ = ["LargeResPatch", "__version__", "viewBricks"]

try:
    __version__ = version("largerespatch")
except PackageNotFoundError:  # a checkout on the path
    __version__ = "unknown"
