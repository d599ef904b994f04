"""Stable Diffusion pipelines at resolutions far beyond what memory and time allow otherwise."""

from importlib.metadata import version

from .patch import LargeResPatch
from .view import viewBricks

__all__ = ["LargeResPatch", "__version__", "viewBricks"]
__version__ = version("largerespatch")
