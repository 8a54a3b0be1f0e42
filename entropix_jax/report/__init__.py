"""What a run leaves to look at: the trace of every token, and the page made from it."""
