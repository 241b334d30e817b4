"""The client of the Hugging Face Hub; it imports nothing else of ours."""
