"""The ground: files that appear whole, their names, sizes and dtypes."""
