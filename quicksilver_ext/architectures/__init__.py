"""How each family's checkpoint becomes a model: one file a family."""
