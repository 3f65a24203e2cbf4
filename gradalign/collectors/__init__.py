"""Collectors: from losses to Gramians, and from weights to ``p.grad``."""
