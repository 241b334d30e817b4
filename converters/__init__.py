"""Reading, recognising, planning and writing checkpoints; imports neither torch nor tensorflow."""
