"""The sampler: one loop, and the parts that it is made of."""
