"""From folders and the Hub to components with weights, and back."""
