"""gradalign in the trainers and loggers that people use; each module needs its package, and names the extra for it."""
