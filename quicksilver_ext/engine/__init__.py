"""A batch through the layers: cache, plan, executors, and the one loop that runs them."""
