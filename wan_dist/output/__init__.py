"""What a run leaves behind and what it shows: files that appear whole or not at all, the record, progress."""
