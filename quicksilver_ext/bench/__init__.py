"""Speed beside other systems."""
