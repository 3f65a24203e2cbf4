"""``python -m gradalign.cli``."""

from __future__ import annotations

import sys

from gradalign.cli import main

sys.exit(main())
