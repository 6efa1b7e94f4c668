"""vessel-export: a checkpoint, its base model and SAM2 in, a bundle out."""
