"""Transformer blocks in which text and image tokens attend to one another, tile by tile."""
