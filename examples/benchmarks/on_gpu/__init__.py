"""The parts of `gpu.py`: what one run on one GPU shows."""
