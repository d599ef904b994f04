"""What maps and pictures on the host cost."""
