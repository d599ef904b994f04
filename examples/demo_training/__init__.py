"""The parts of `train_demo_model.py`: maps, captions, VAE, text encoder, denoisers, export."""
