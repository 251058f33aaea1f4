"""``python -m groundup``."""

import sys

from groundup.cli.main import main

sys.exit(main())
