"""An artifact in, an endpoint out."""
