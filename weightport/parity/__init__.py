"""Runs the source framework beside a converted repo and says where the numbers part."""
