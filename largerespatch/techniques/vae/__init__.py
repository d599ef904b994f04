"""Encoder and decoder of an autoencoder in pieces: exactly, or in passes over tiles."""
