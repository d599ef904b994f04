"""The parts of `train_demo_model.py`: photographs, VAE, text-to-image, export."""
