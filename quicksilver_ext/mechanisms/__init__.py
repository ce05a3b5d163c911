"""What decides, token by token, what can be left out: one file a mechanism."""
