"""The families of denoisers, and what stands beside them: one file each. Importing this registers all of them."""

from ..core.families import load

load(__name__, __path__)
