"""``python -m clip2scene.cli``, where the console script is not on the path."""

from __future__ import annotations

import sys

from clip2scene.cli import main

sys.exit(main())
