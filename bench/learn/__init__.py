"""Does it learn? A training job on real data, and the same by every kind of feedback."""
