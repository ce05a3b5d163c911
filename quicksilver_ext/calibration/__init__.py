"""Quality and cost of a config on a text."""
