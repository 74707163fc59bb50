"""`python -m wantrain`."""

import sys

from wantrain.cli import main

sys.exit(main())
