"""One module for each layout that is written."""
