"""``python -m qtvit``."""

import sys

from qtvit_cli import main

sys.exit(main())
