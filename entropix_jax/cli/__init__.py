"""What command lines need: flags and config files, one sentence for a mistake, colours in a terminal."""
