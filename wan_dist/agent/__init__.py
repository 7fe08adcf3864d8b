"""One node's side of a run: check everything, freeze the config, start the ranks, report what became of them."""
