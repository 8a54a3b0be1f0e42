"""The trace of a run, with every token's numbers; reading it back; its web page and figures."""
