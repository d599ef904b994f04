from . import map_operations  # noqa: F401  what maps can do registers itself
