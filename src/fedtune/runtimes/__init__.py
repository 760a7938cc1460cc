"""Where clients run. A round is the same everywhere, and so are its bits."""
