"""The phases of a run, from a frozen config to files on disk: `generate` and `decode` are the screens to read first."""
