"""Pages for people: templates, style and plots."""
