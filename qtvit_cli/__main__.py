"""``python -m qtvit_cli``."""

import sys

from . import main

sys.exit(main())
