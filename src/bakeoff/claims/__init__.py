"""One file per method: its paper's claim as a study, and the recorded results."""
