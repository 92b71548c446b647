"""Does it replace warmup? Trainings that differ in one thing, and what can be concluded from them."""
