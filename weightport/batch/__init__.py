"""Many conversions: what is to be done, one job, whoever runs it, and what came of it."""
