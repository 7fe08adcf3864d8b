"""From a path or hub id to tensors in a module: where a checkpoint is, what its files hold, and reading them."""
