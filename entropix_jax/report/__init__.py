"""The trace of a run, with every token's numbers; reading it back; its web page and figures."""

ENTROPY_STEPS = (0.05, 0.3, 0.8, 1.5, 2.5)  # nats; upper bounds of all colours but the last
