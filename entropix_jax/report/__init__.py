"""What a run leaves to look at: the trace of every token, and the pages made from it."""

ENTROPY_STEPS = (0.05, 0.3, 0.8, 1.5, 2.5)  # nats; upper bounds of all colours but the last
