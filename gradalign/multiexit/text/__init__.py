"""Multi-exit networks for text; needs the extra "text"."""
