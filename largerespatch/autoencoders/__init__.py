"""The families of autoencoders: one file each. Importing this registers all of them."""

from ..core.families import load

load(__name__, __path__)
