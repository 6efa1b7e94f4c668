"""A bundle and a recipe to compiled engines. Does not know about checkpoints or torch."""
