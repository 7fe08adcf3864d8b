"""The command line: free text made literal, overrides checked, Hydra run, exit codes."""
