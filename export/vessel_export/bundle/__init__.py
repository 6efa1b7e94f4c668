"""LoRA merge, weights and graphs to a bundle. Does not know about engines or about the PyTorch reference."""
