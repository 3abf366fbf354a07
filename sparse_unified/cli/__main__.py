# SPDX-License-Identifier: Apache-2.0
"""`python -m sparse_unified.cli`, the same as `sparse-unified`."""

import sys

from sparse_unified.cli import main

if __name__ == "__main__":
    sys.exit(main())
