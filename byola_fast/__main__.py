"""``python -m byola_fast`` is ``byola-fast``."""

import sys

from byola_fast.cli import main

sys.exit(main())
